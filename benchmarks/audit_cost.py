"""What an audit costs on a CPU: time and memory, for the numbers in docs/AUDIT.md.

python benchmarks/audit_cost.py
"""

import resource
import statistics
import time
from collections.abc import Callable

import torch

from turnout.audit import models
from turnout.audit.api import default_regions
from turnout.audit.build import build_report
from turnout.audit.decoder import Steps
from turnout.audit.recorder import Recorder

PROMPT, STEPS = 64, 16


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    model = models.small_gemma4(torch.bfloat16, num_hidden_layers=30, num_experts=128, top_k_experts=8)
    with torch.no_grad():
        plain, recorded = (Steps(model, prefill=PROMPT, concurrency=1) for _ in range(2))
        plain.first()
        plain_ms = statistics.median(seconds(plain.next) for _ in range(STEPS)) * 1e3
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        recorder = Recorder(model)
        prefill = seconds(lambda: recorder.run("prefill", recorded.first))
        steps = [seconds(lambda: recorder.run("decode", recorded.next)) for _ in range(STEPS)]
    judge = seconds(lambda: build_report(recorder, "cost", default_regions(model)))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # Linux counts in KiB

    operators = len(recorder.graph.ops)
    per_step = sum(recorder.graph.calls[op.call] == "decode" for op in recorder.graph) / STEPS
    recorded_ms = statistics.median(steps) * 1e3
    print(f"torch {torch.__version__}, 1 thread, {per_step:.0f} operators a decode step")
    print(f"decode step: {plain_ms:.0f} ms plain, {recorded_ms:.0f} ms recorded, {recorded_ms / plain_ms:.1f} times,"
          f" {(recorded_ms - plain_ms) * 1e3 / per_step:.0f} us more for each operator")  # fmt: skip
    print(f"{PROMPT} tokens and {STEPS} steps: {prefill + sum(steps):.1f} s to record, {judge:.1f} s to judge")
    print(f"memory: {grown / 2**20:.0f} MiB more for {operators} operators, {grown / operators / 2**10:.1f} KiB each")


if __name__ == "__main__":
    main()
