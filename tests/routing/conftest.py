"""Fixtures of the routing tests: every behaviour is asked of each implementation."""

import pytest
import torch

import turnout
from turnout.testing.checks import assert_bitwise_equal, assert_matches_oracle, assert_routing_valid
from turnout.testing.inputs import poisoned_out


@pytest.fixture(params=["reference", "cpu", "triton"])
def impl(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


@pytest.fixture
def device(impl, kernel_device):
    return torch.device("cpu") if impl == "cpu" else kernel_device


@pytest.fixture(autouse=True)
def interpreter_tile(request, monkeypatch):
    """In the interpreter, sixteen rows a program: its cost is per program and operation, not per row."""
    if "impl" not in request.fixturenames or request.getfixturevalue("impl") != "triton":
        return
    if request.getfixturevalue("kernel_device").type == "cpu":
        from turnout.routing import triton as kernels

        monkeypatch.setattr(kernels, "choose_tile", lambda *_: kernels.Tile(rows=16, num_warps=1))


@pytest.fixture
def routed(impl):
    """``turnout.route`` into poisoned buffers between guards, checked against the rules and the oracle."""

    def route(logits, spec, contract, inputs=None):
        inputs = turnout.RoutingInputs() if inputs is None else inputs
        out = poisoned_out(logits.shape[0], spec.top_k, contract, logits.device)
        routing = turnout.route(logits, spec, contract, inputs, out=out.tensors, impl=impl)
        for given, returned in zip(out, routing[:2], strict=True):
            assert returned is given.tensor
            assert given.guards_hold(), "written outside the buffer"
        assert_routing_valid(routing, logits, spec, contract, inputs)
        assert_matches_oracle(routing, logits, spec, contract, inputs)
        # Again without buffers: kernels keep what they compiled, and the second call takes another path.
        assert_bitwise_equal(turnout.route(logits, spec, contract, inputs, impl=impl), routing)
        return routing

    return route
