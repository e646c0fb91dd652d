"""Set-up of all tests: where Triton kernels run, and how much of the machine is used."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch


def find_gpu():
    """The device that Triton kernels run on, or None."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None and accelerator.type in ("cuda", "xpu") else None


GPU = find_gpu()
if GPU is None:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before anything imports one

hypothesis.settings.register_profile("turnout", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("turnout")


@pytest.fixture(scope="session")
def gpu():
    """The GPU; tests that ask for it carry the mark ``gpu``."""
    if GPU is None:
        pytest.skip("no CUDA, ROCm or XPU device on this machine")
    return GPU


@pytest.fixture(scope="session")
def kernel_device():
    """Where Triton kernels run: the GPU, or the CPU in Triton's interpreter."""
    return torch.device("cpu") if GPU is None else GPU


def pytest_configure(config):
    """Infinities are subtracted on purpose; numpy, which Triton's interpreter computes with, warns of it."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
