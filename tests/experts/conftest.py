"""Fixtures of the experts tests: every behaviour is asked of each implementation."""

import pytest
import torch

import turnout
from turnout.experts.api import IMPLS
from turnout.impls import module_of
from turnout.testing.experts import assert_accurate
from turnout.testing.inputs import poisoned_buffer

NAN_BYTES = 0xFF


@pytest.fixture(params=IMPLS)
def impl(request):
    if request.param not in ("reference", "cpu"):
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


@pytest.fixture
def device(impl, kernel_device):
    return torch.device("cpu") if impl == "cpu" else kernel_device


@pytest.fixture
def is_interpreted(impl, device):
    """Whether the implementation's kernels run in Triton's interpreter: slow, and wrong in bfloat16 products."""
    return impl not in ("reference", "cpu") and device.type == "cpu"


@pytest.fixture(autouse=True)
def interpreter_tiles(request, monkeypatch):
    """In the interpreter, few programs of large tiles: its cost is per program and operation, not per element."""
    if "is_interpreted" in request.fixturenames and request.getfixturevalue("is_interpreted"):
        from turnout.experts import triton as kernels

        for choose in ("gate_up_tile", "down_tile"):
            monkeypatch.setattr(kernels, choose, lambda *_: kernels.Tile(rows=64, columns=64, num_warps=4))


@pytest.fixture
def modes(impl):
    """Values of ``batch_invariant`` that take different paths: most implementations are invariant by themselves."""
    return (False, True) if hasattr(module_of("experts", impl), "launch_batch_invariant") else (False,)


@pytest.fixture
def run(impl, device, is_interpreted):
    """``turnout.experts`` into a poisoned buffer between guards, checked against the oracle."""

    def run_case(case, **options):
        if is_interpreted and case.dtype == torch.bfloat16 and impl != "triton":
            pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
        return run_inputs(case.make(device), **options)

    def run_inputs(inputs, **options):
        shape, dtype = tuple(inputs.hidden_states.shape), inputs.hidden_states.dtype
        buffer = poisoned_buffer(shape, dtype, device, NAN_BYTES)
        out = turnout.experts(*inputs.arguments, impl=impl, out=buffer.tensor, **options)
        assert out is buffer.tensor
        assert buffer.guards_hold(), "written outside of the buffer"
        assert_accurate(out, inputs)
        if not is_interpreted:  # kernels keep what they compiled: a second call takes another path
            assert torch.equal(turnout.experts(*inputs.arguments, impl=impl, **options), out)
        return out

    run_case.inputs = run_inputs
    return run_case
