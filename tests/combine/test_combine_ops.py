"""Combine's operators under torch's tools, its refusals, and what it asks of torch."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

import turnout
from turnout.combine.api import choose_impl
from turnout.testing.inputs import poisoned_buffer

BUFFERS = {"turnout::combine", "turnout::combine_out", "aten::empty_strided", "aten::empty"}


def arguments_of(device, num_tokens=5, index_dtype=None):
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(num_tokens * 2, 24, generator=rng).to(device)
    index = None
    if index_dtype is not None:
        index = torch.arange(num_tokens * 2, dtype=index_dtype, device=device).flip(0).view(num_tokens, 2)
    return rows, torch.rand(num_tokens, 2, generator=rng).to(device), index


@pytest.mark.parametrize("index_dtype", [None, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_opcheck_of_combine(num_tokens, index_dtype, impl, device):
    arguments = arguments_of(device, num_tokens, index_dtype)
    torch.library.opcheck(torch.ops.turnout.combine.default, (*arguments, impl))


def test_opcheck_of_combine_out(impl, device):
    out = {"out": torch.empty(5, 24, device=device)}
    torch.library.opcheck(torch.ops.turnout.combine_out.default, (*arguments_of(device), impl), out)


def test_cold_fullgraph_compile_with_any_number_of_tokens(impl, device):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(turnout.combine, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (5, 3, 9):
        arguments = arguments_of(device, num_tokens, torch.int32)
        assert torch.equal(compiled(*arguments, impl=impl), turnout.combine(*arguments, impl=impl))
    assert counter.frame_count == 1


def test_fullgraph_compile_into_a_buffer(impl, device):
    torch._dynamo.reset()
    arguments = arguments_of(device)
    out = torch.full((5, 24), float("nan"), device=device)
    torch.compile(turnout.combine, fullgraph=True, backend="aot_eager")(*arguments, impl=impl, out=out)
    assert torch.equal(out, turnout.combine(*arguments, impl=impl))


def test_shape_and_dtype_without_data(impl):
    out = turnout.combine(*arguments_of("meta", 7, torch.int64), impl=impl)
    assert (out.shape, out.dtype, out.device.type, out.stride()) == ((7, 24), torch.float32, "meta", (24, 1))


@pytest.mark.parametrize(("device_type", "impl"), [("cpu", "cpu"), ("cuda", "triton"), ("mps", "reference")])
def test_auto_chooses_by_device_and_says_why(device_type, impl):
    with FakeTensorMode(allow_non_fake_inputs=True):
        choice = choose_impl(torch.empty(2, 8, device=device_type))
    assert choice.impl == impl
    assert choice.reason


@pytest.mark.parametrize("index_dtype", [None, torch.int32, torch.int64], ids=str)
def test_the_operator_makes_its_result_and_nothing_else(index_dtype, kernel_device):
    """Of what ``auto`` takes here: no [S, H] float32, no index in another dtype."""
    arguments = arguments_of(kernel_device, 5, index_dtype)
    arguments = (arguments[0].bfloat16(), *arguments[1:])
    turnout.combine(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        turnout.combine(*arguments)
    assert {event.name for event in profiler.events() if "::" in event.name} <= BUFFERS


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        pytest.param({"expert_out": lambda x: x.int()}, ValueError, "float16, got torch.int32", id="integers"),
        pytest.param({"expert_out": lambda x: x.double()}, ValueError, "got torch.float64", id="float64"),
        pytest.param({"expert_out": lambda x: x[0]}, ValueError, r"\[T \* K, H\] or.*got shape \[24\]", id="rank_1"),
        pytest.param({"expert_out": lambda x: x[:9]}, ValueError, r"9 rows.*\[5, 2\] makes 10 slots", id="fewer_rows"),
        pytest.param(
            {"expert_out": lambda x: x.view(2, 5, 24)}, ValueError, r"\[2, 5, 24\], topk_weights \[5, 2\]", id="k_first"
        ),
        pytest.param(
            {"expert_out": lambda x: x.view(5, 2, 24)[:, :, :12]},
            ValueError,
            r"\[T, K, H\] must be contiguous, got strides \(48, 24, 1\)",
            id="rank_3_apart",
        ),
        pytest.param(
            {"expert_out": lambda x: x.tile(1, 2)[:, ::2]}, ValueError, "must have contiguous rows", id="columns_apart"
        ),
        pytest.param({"expert_out": lambda x: x.requires_grad_()}, ValueError, "requires grad", id="requires_grad"),
        pytest.param({"expert_out": lambda x: x.tolist()}, TypeError, "expert_out must be a tensor", id="a_list"),
        pytest.param({"topk_weights": lambda x: x.double()}, ValueError, "topk_weights .* got .*64", id="weights_64"),
        pytest.param({"topk_weights": lambda x: x.flatten()}, ValueError, r"\[any, any\].*got \[10\]", id="flat"),
        pytest.param(
            {"topk_weights": lambda x: x.t().contiguous().t()}, ValueError, "topk_weights must be contig", id="strided"
        ),
        pytest.param(
            {"inv_permuted_idx": lambda x: torch.zeros(5, 2, dtype=torch.int16, device=x.device)},
            ValueError,
            "inv_permuted_idx must be .* of torch.int32 or torch.int64, got .*int16",
            id="short_index",
        ),
        pytest.param(
            {"inv_permuted_idx": lambda x: torch.zeros(10, dtype=torch.int32, device=x.device)},
            ValueError,
            r"inv_permuted_idx must be \[5, 2\] of .*, got \[10\]",
            id="flat_index",
        ),
        pytest.param(
            {"out": lambda x: torch.empty(5, 25, device=x.device)}, ValueError, r"out must be \[5, 24\]", id="out"
        ),
        pytest.param({"impl": lambda x: "cuda"}, ValueError, "impl must be one of auto, reference.*'cuda'", id="impl"),
    ],
)
def test_refusals(change, error, match, impl, device):
    """A sentence that says what was given and what is wanted, and a buffer left as it was."""
    rows, weights, _ = arguments_of(device)
    buffer = poisoned_buffer((5, 24), torch.float32, device, 0xFF)
    given = {"expert_out": rows, "topk_weights": weights, "out": buffer.tensor, "impl": impl}
    given |= {name: make(given.get(name, rows)) for name, make in change.items()}
    with pytest.raises(error, match=match):
        turnout.combine(**given)
    assert buffer.is_untouched()


@pytest.mark.gpu
def test_cpu_implementation_elsewhere(gpu):
    with pytest.raises(ValueError, match="impl='cpu' needs expert_out on a CPU, got cuda"):
        turnout.combine(*arguments_of(gpu), impl="cpu")


def test_a_buffer_that_is_being_read_is_refused(impl, device):
    slots = torch.randn(8, 4, device=device)
    with pytest.raises(ValueError, match="out overlaps expert_out, which is read while out is written"):
        turnout.combine(slots, torch.rand(4, 2, device=device), out=slots[2:6], impl=impl)
