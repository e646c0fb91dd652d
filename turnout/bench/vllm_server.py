"""vLLM's own server, `vllm serve`, on loopback, for tests and measurements: no process of it outlives them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

# Little memory, and threads that leave cores to other processes, for vLLM on a CPU; nothing over the network.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS = ("--enforce-eager", "--max-model-len", "256")
NAME = "served"  # what requests call the model
SECONDS_TO_END = 20.0


class Server:
    """A server that has been started.

    Attributes:
        process: its first process, which leads a process group of all.
        url: where it listens.
        log: what its processes print.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log
        self._started = time.monotonic()

    def is_healthy(self) -> bool:
        """Whether it says that it can take requests."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait(self, seconds: float = 400.0) -> float:
        """Wait until it takes requests.

        Returns:
            The seconds since its start.

        Raises:
            RuntimeError: it has ended, or they are over; the message ends with its log.
        """
        while not self.is_healthy():
            elapsed = time.monotonic() - self._started
            if self.process.poll() is not None or elapsed > seconds:
                raise RuntimeError(f"vllm serve takes no requests after {elapsed:.0f} s:\n{self.log.read_text()}")
            time.sleep(0.1)
        return time.monotonic() - self._started


@contextlib.contextmanager
def serve(
    model: Path, log: Path, *options: str, folders: tuple[Path, ...] = (), **environment: str
) -> Iterator[Server]:
    """Start `vllm serve`, which takes requests once `Server.wait` has returned; at the end, end all its processes.

    Args:
        model: its folder.
        log: the file for what it prints.
        options: of `vllm serve`, beside `OPTIONS`.
        folders: what it can import from, beside its environment; see `describe_vllm`.
        environment: variables, beside `ENVIRONMENT`.
    """
    port = _free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", NAME,
               "--host", "127.0.0.1", "--port", str(port), *OPTIONS, *options]  # fmt: skip
    search = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, **ENVIRONMENT, "PYTHONPATH": search, **environment}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Server(process, f"http://127.0.0.1:{port}", log)
    finally:
        _end(process)


def describe_vllm(folder: Path) -> Path:
    """Let `vllm serve` start from `vllm-cpu`: it asks for the metadata of a distribution called vllm, which has none.

    Returns:
        The folder, for PYTHONPATH.
    """
    metadata = folder / "vllm.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    version = importlib.metadata.version("vllm-cpu")  # vLLM knows its platform by "cpu" in the version
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return folder


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asked to end, vLLM frees its shared memory; what is left of the process group then is killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
