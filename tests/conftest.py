"""Set-up of all tests: where Triton kernels run, and how much of the machine is used."""

import importlib.util
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
    if GPU is None and importlib.util.find_spec("triton"):
        mend_the_interpreter()


def mend_the_interpreter():
    """Triton 3.6's interpreter reads the bounds of a loop in a way that numpy refuses from 2.4 on.

    And it takes xor and or, which its sort consists of, element by element in Python: here numpy does that.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch, reduce = interpreter._patch_lang_tensor, interpreter.ReduceOps.generic_reduce
    fast = {tl.standard._xor_combine: np.bitwise_xor, tl.standard._or_combine: np.bitwise_or}

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def generic_reduce(self, input):
        if self.combine_fn not in fast:
            return reduce(self, input)
        reduced = fast[self.combine_fn].reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(reduced, input[0].dtype)

    interpreter._patch_lang_tensor, interpreter.ReduceOps.generic_reduce = patch_lang_tensor, generic_reduce
