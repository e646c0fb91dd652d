"""The router's projection against float64, and its launch under torch's tools."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import turnout
from turnout.router import api
from turnout.router.api import project

PLAIN = turnout.RouterSpec(num_experts=12, top_k=2)
GEMMA4 = turnout.RouterSpec(num_experts=12, top_k=2, input_norm="rms_scale")
BIASED = turnout.RouterSpec(num_experts=7, top_k=2, router_bias=True, projection_dtype="float32")
SPECS = pytest.mark.parametrize("spec", [PLAIN, GEMMA4, BIASED], ids=["plain", "gemma4", "biased float32"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def drawn(spec, num_tokens, hidden_size, dtype, device, seed=0):
    """Hidden states [T, H] and the router's parameters."""
    rng = torch.Generator().manual_seed(seed)

    def tensor(*size, offset=0.0):
        return (torch.randn(*size, generator=rng) + offset).to(device, dtype)

    router = turnout.RouterWeights(
        tensor(spec.num_experts, hidden_size),
        tensor(spec.num_experts) if spec.router_bias else None,
        tensor(hidden_size, offset=1.0) if spec.input_norm != "none" else None,
    )
    return tensor(num_tokens, hidden_size), router


def float64_logits(hidden_states, router, spec):
    """From what the projection reads: rounded as the model rounds it, since that decides more than the sum does."""
    rows = hidden_states.cpu()
    if router.scale is not None:
        wide = rows.float()
        factor = (wide.double().pow(2).mean(-1, keepdim=True) + spec.input_norm_eps).rsqrt()
        rows = (wide * factor.float()).to(rows.dtype) * router.scale.cpu() * rows.shape[1] ** -0.5
    bias = 0 if router.bias is None else router.bias.cpu().double()
    terms = rows.double()[:, None] * router.proj.cpu().double()
    return terms.sum(-1) + bias, terms.abs().sum(-1)


@SPECS
@DTYPES
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 1), (1, 64), (3, 200), (2, 5000)], ids=str)
def test_one_launch_against_float64(num_tokens, hidden_size, dtype, spec, kernel_device):
    hidden_states, router = drawn(spec, num_tokens, hidden_size, dtype, kernel_device)
    logits = project(hidden_states, router, spec, impl="triton").cpu()
    assert logits.dtype == (torch.float32 if spec.projection_dtype == "float32" else dtype)
    want, size = float64_logits(hidden_states, router, spec)
    # The sum in float32, one rounding at the end; a norm whose last bit differs moves values by one rounding each.
    unit = torch.finfo(torch.float32).eps
    slack = size * (64 * unit + (torch.finfo(dtype).eps / 8 if router.scale is not None else 0))
    slack += want.abs() * torch.finfo(logits.dtype).eps
    assert ((logits.double() - want).abs() <= slack).all()


@SPECS
@DTYPES
def test_rows_do_not_depend_on_their_batch(dtype, spec, kernel_device):
    hidden_states, router = drawn(spec, 5, 96, dtype, kernel_device)
    together = project(hidden_states, router, spec, impl="triton")
    for row, logits in zip(hidden_states, together, strict=True):
        assert torch.equal(project(row[None], router, spec, impl="triton")[0], logits)


def test_rows_that_lie_apart_and_no_rows(kernel_device):
    hidden_states, router = drawn(GEMMA4, 4, 96, torch.float32, kernel_device)
    apart = torch.full((4, 200), torch.nan, device=kernel_device)
    apart[:, :96] = hidden_states
    want = project(hidden_states, router, GEMMA4, impl="triton")
    assert torch.equal(project(apart[:, :96], router, GEMMA4, impl="triton"), want)
    assert torch.equal(project(apart[1:2, :96], router, GEMMA4, impl="triton"), want[1:2])
    assert project(hidden_states[:0], router, GEMMA4, impl="triton").shape == (0, 12)


def test_auto_takes_the_launch_for_few_tokens_on_a_gpu():
    few, many = torch.empty(api.FEW_TOKENS, 8, device="meta"), torch.empty(api.FEW_TOKENS + 1, 8, device="meta")
    assert api.choose_impl(few).impl == api.choose_impl(torch.empty(1, 8)).impl == "reference"
    on_gpu = {"is_cuda": True, "is_xpu": False}
    for tensor, impl in ((few, "triton"), (many, "reference"), (few.T, "reference")):
        stand_in = type("Tensor", (), {**on_gpu, "shape": tensor.shape, "stride": tensor.stride})()
        assert api.choose_impl(stand_in).impl == impl
        assert api.choose_impl(stand_in).reason


@SPECS
def test_opcheck(spec, kernel_device):
    hidden_states, router = drawn(spec, 3, 40, torch.float32, kernel_device)
    arguments = (hidden_states, *router, 1e-6, spec.projection_dtype == "float32")
    torch.library.opcheck(torch.ops.turnout.project.default, arguments)


def test_cold_fullgraph_compile_with_any_number_of_tokens(kernel_device):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(project, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (3, 2, 4):
        arguments = *drawn(GEMMA4, num_tokens, 40, torch.float32, kernel_device), GEMMA4
        assert torch.equal(compiled(*arguments, impl="triton"), project(*arguments, impl="triton"))
    assert counter.frame_count == 1


def test_refusals(kernel_device):
    hidden_states, router = drawn(PLAIN, 3, 40, torch.float32, kernel_device)
    with pytest.raises(ValueError, match="impl must be one of auto, reference, triton; got 'cpu'"):
        project(hidden_states, router, PLAIN, impl="cpu")
    with pytest.raises(ValueError, match=r"hidden_states must be \[T, H\], got shape \[40\]"):
        project(hidden_states[0], router, PLAIN)
    with pytest.raises(ValueError, match=r"must have contiguous rows, got strides \(1, 3\)"):
        project(hidden_states.T.contiguous().T, router, PLAIN, impl="triton")
    with pytest.raises(ValueError, match="hidden_states requires grad, and turnout computes for inference only"):
        project(hidden_states.clone().requires_grad_(), router, PLAIN, impl="triton")
    with pytest.raises(ValueError, match=r"the spec has router_bias=True, but RouterWeights\.bias is missing"):
        project(hidden_states, router, dataclasses.replace(PLAIN, router_bias=True))
    integers = turnout.RouterWeights(router.proj.int())
    with pytest.raises(ValueError, match=r"router\.proj must be"):
        project(hidden_states, integers, PLAIN)
    with pytest.raises(ValueError, match=r"hidden_states must be float32, bfloat16 or float16, got torch\.int32"):
        project(hidden_states.int(), integers, PLAIN)
