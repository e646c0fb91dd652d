"""Fixtures of the routing tests: every behaviour is asked of each implementation."""

import dataclasses

import pytest
import torch

import turnout
from turnout.testing.checks import (
    assert_bitwise_equal,
    assert_load_counted,
    assert_matches_oracle,
    assert_routing_valid,
)
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
    """``turnout.route`` into poisoned buffers between guards, checked against the rules, the oracle and the reference.

    What `route` writes into ``inputs``, load and replay, is that of the first call.
    """

    def route(logits, spec, contract, inputs=None):
        inputs = turnout.RoutingInputs() if inputs is None else inputs
        apart = [with_buffers_of_its_own(inputs) for _ in range(2)]
        load = None if inputs.expert_load is None else inputs.expert_load.clone()
        out = poisoned_out(logits.shape[0], spec.top_k, contract, logits.device)
        routing = turnout.route(logits, spec, contract, inputs, out=out.tensors, impl=impl)
        for given, returned in zip(out, routing[:2], strict=True):
            assert returned is given.tensor
            assert given.guards_hold(), "written outside the buffer"
        assert_routing_valid(routing, logits, spec, contract, inputs)
        assert_matches_oracle(routing, logits, spec, contract, inputs)
        if load is not None:
            assert_load_counted(load, routing, spec, contract, inputs)
        # Again without buffers: kernels keep what they compiled, and the second call takes another path.
        assert_bitwise_equal(turnout.route(logits, spec, contract, apart[0], impl=impl), routing)
        reference = turnout.route(logits, spec, contract, apart[1], impl="reference")
        assert_bitwise_equal(reference._replace(topk_weights=routing.topk_weights), routing)  # ids, whatever is near
        return routing

    return route


def with_buffers_of_its_own(inputs):
    """The same inputs for a call that must not add to the load, or write the replay, of another."""
    buffers = {name: getattr(inputs, name) for name in ("expert_load", "replay_ids")}
    return dataclasses.replace(
        inputs, **{k: None if buffer is None else buffer.clone() for k, buffer in buffers.items()}
    )
