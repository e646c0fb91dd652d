"""Fixtures of the remap tests: every behaviour is asked of each implementation."""

import numpy as np
import pytest
import torch
from remap_cases import bits, oracle, poisoned_remapped

from turnout.remap.api import Remapped, remap_hidden_states


@pytest.fixture(params=["reference", "cpu", "triton"])
def impl(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


@pytest.fixture
def device(impl, kernel_device):
    return torch.device("cpu") if impl == "cpu" else kernel_device


@pytest.fixture(autouse=True)
def interpreter_tiles(request, monkeypatch):
    """In the interpreter, few programs of many rows: its cost is per program and operation, not per element."""
    if "kernel_device" not in request.fixturenames or request.getfixturevalue("kernel_device").type != "cpu":
        return
    pytest.importorskip("triton", reason="triton is not installed")
    from turnout.remap import triton as kernels

    monkeypatch.setattr(kernels, "choose_copy_tile", lambda columns: kernels.CopyTile(256, 64))
    monkeypatch.setattr(kernels, "choose_gemm_tile", lambda rows, experts: kernels.GemmTile(256, 64, 64))


@pytest.fixture
def remapped(impl):
    """`remap_hidden_states` into poisoned buffers between guards, checked against the oracle."""

    def remap(hidden_states, topk_ids, num_experts, expert_map=None, scales=None):
        given = {"expert_map": expert_map, "hidden_states_scales": scales, "impl": impl}
        buffers = poisoned_remapped(hidden_states, topk_ids, num_experts, scales)
        out = Remapped(*(None if buffer is None else buffer.tensor for buffer in buffers))
        result = remap_hidden_states(hidden_states, topk_ids, num_experts, out=out, **given)
        assert result is out
        # Kernels keep what they compiled: the second call takes another path. Not in the interpreter, which is slow.
        is_interpreted = impl == "triton" and hidden_states.is_cpu and len(hidden_states) > 64
        again = result if is_interpreted else remap_hidden_states(hidden_states, topk_ids, num_experts, **given)
        want = oracle(hidden_states, topk_ids, num_experts, expert_map, scales)
        for name, one, other, right, buffer in zip(Remapped._fields, result, again, want, buffers, strict=True):
            if right is None:
                assert one is other is None
                continue
            assert buffer.guards_hold(), f"{name} was written outside of its buffer"
            assert one.dtype == other.dtype
            assert np.array_equal(bits(one), right), f"{name}: got {one}, want {right}"
            assert np.array_equal(bits(other), right), f"{name} of the second call: got {other}, want {right}"
        return result

    return remap
