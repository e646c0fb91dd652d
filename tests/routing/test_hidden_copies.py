"""No copy hides inside the operator: what the profiler sees in there, which a dispatch mode outside does not."""

import pytest
import torch

import turnout
from turnout.contracts import IDS_DTYPES, WEIGHTS_DTYPES
from turnout.routing import ops
from turnout.testing.inputs import make_logits

SPEC = turnout.RouterSpec(num_experts=60, top_k=6, renormalize=True, per_expert_scale=True)
COPIES = {"aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous"}
# All that a call may ask of torch: two buffers for its results.
ALLOWED = {"turnout::route", "turnout::route_out", "aten::empty_strided", "aten::empty"}


def operators_inside(call):
    """The names of the torch operators that run during a call, after one that warms up."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return {event.name for event in profiler.events() if "::" in event.name}


def call_of(impl, device, contract):
    logits = make_logits("normal", 4, 60, torch.bfloat16, device)
    inputs = turnout.RoutingInputs(
        per_expert_scale=torch.ones(60, dtype=torch.bfloat16, device=device),
        is_padding=torch.tensor([False, True, False, False], device=device),
    )
    return lambda: turnout.route(logits, SPEC, contract, inputs, impl=impl)


@pytest.fixture
def kernel_impl(kernel_device):
    """The implementation that ``auto`` takes here. (The interpreter of Triton works by copying.)"""
    return "cpu" if kernel_device.type == "cpu" else "triton"


@pytest.mark.parametrize("ids_dtype", IDS_DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES, ids=str)
def test_the_operator_only_makes_its_results(ids_dtype, weights_dtype, kernel_impl, kernel_device):
    contract = turnout.Contract(ids_dtype=ids_dtype, weights_dtype=weights_dtype, sentinel="num_experts")
    assert operators_inside(call_of(kernel_impl, kernel_device, contract)) <= ALLOWED


def test_a_planted_cast_is_seen(kernel_impl, kernel_device, monkeypatch):
    """The check itself: one ``.to()`` inside the operator, unseen from outside, breaks the budget."""
    launch = ops._launch_of(kernel_impl)

    def with_a_cast(router_logits, *arguments):
        launch(router_logits.to(torch.float32), *arguments)

    monkeypatch.setattr(ops, "_launch_of", lambda impl: with_a_cast)
    contract = turnout.Contract(ids_dtype=torch.int64, sentinel=-1)
    seen = operators_inside(call_of(kernel_impl, kernel_device, contract))
    assert not seen <= ALLOWED
    assert seen & COPIES
