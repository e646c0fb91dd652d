"""No copy hides inside the operator: what the profiler sees in there, which a dispatch mode outside does not."""

import pytest
import torch

import turnout
from turnout.contracts import IDS_DTYPES, WEIGHTS_DTYPES
from turnout.experts import cpu
from turnout.testing.experts import ExpertsCase

COPIES = {"aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous"}
# All that a call may ask of torch: buffers for its result and for what lies between its parts.
BUFFERS = {"turnout::experts", "turnout::experts_out", "aten::empty_strided", "aten::empty"}
# The experts of many rows on a CPU: parts of buffers and weights, products, and the offsets read by Python.
GEMMS = {
    "aten::mm", "aten::addmm", "aten::new_empty", "aten::slice", "aten::select", "aten::as_strided", "aten::transpose",
    "aten::resolve_conj", "aten::resolve_neg", "aten::expand", "aten::view",
}  # fmt: skip


def operators_inside(call):
    """The names of the torch operators that run during a call, after one that warms up."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return {event.name for event in profiler.events() if "::" in event.name}


def call_of(case, device, **options):
    inputs = case.make(device)
    return lambda: turnout.experts(*inputs.arguments, **options)


@pytest.mark.parametrize("ids_dtype", IDS_DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["gelu_tanh", "gpt_oss"])
def test_the_operator_makes_buffers_and_nothing_else(spec, ids_dtype, weights_dtype, kernel_device):
    """Of what ``auto`` takes here, for few tokens. (The interpreter of Triton works by copying.)"""
    case = ExpertsCase(num_tokens=3, spec=spec, dtype=torch.bfloat16, ids_dtype=ids_dtype, weights_dtype=weights_dtype)
    assert operators_inside(call_of(case, kernel_device)) <= BUFFERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", ["gelu_tanh", "gpt_oss"])
def test_products_through_torch_copy_nothing(spec, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_has_fast_gemm", lambda dtype: True)
    monkeypatch.setattr(cpu, "FEW_PRODUCTS", 0)
    case = ExpertsCase(num_tokens=64, num_experts=4, spec=spec, dtype=dtype, ids_dtype=torch.int64)
    seen = operators_inside(call_of(case, "cpu", impl="cpu"))
    assert seen & {"aten::mm", "aten::addmm"}
    allowed = BUFFERS | GEMMS
    if spec == "gpt_oss":
        allowed |= {"aten::copy_"}  # inside of aten::addmm: it writes the bias, and adds the product
    assert seen <= allowed


def test_a_planted_cast_is_seen(kernel_device, monkeypatch):
    """The check itself: one ``.to()`` inside the operator, unseen from outside, breaks the budget."""
    from turnout.experts import ops

    launch_of = ops._launch_of

    def with_a_cast(*choice):
        launch = launch_of(*choice)

        def cast_first(hidden_states, weights, routing, spec, out):
            launch(hidden_states, weights, routing._replace(topk_ids=routing.topk_ids.to(torch.int32)), spec, out)

        return cast_first

    monkeypatch.setattr(ops, "_launch_of", with_a_cast)
    seen = operators_inside(call_of(ExpertsCase(num_tokens=3, ids_dtype=torch.int64), kernel_device))
    assert not seen <= BUFFERS
    assert seen & COPIES
