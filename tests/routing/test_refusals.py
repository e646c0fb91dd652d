"""Bad input: a sentence that says what was given and what is wanted, and buffers left as they were."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import turnout
from turnout.testing.inputs import make_logits, poisoned_out

SPEC = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
SCALED = dataclasses.replace(SPEC, per_expert_scale=True)
CONTRACT = turnout.Contract(ids_dtype=torch.int64)
PADDED = dataclasses.replace(CONTRACT, sentinel=-1)


def refused(error, match, impl, device, *, logits=None, spec=SPEC, contract=CONTRACT, **inputs):
    """Assert that route raises ``error``, saying ``match``, and writes nothing."""
    logits = make_logits("normal", 3, 16, device=device) if logits is None else logits
    out = poisoned_out(3, 4, contract, device)
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with pytest.raises(error, match=match):
        turnout.route(logits, spec, contract, turnout.RoutingInputs(**given), out=out.tensors, impl=impl)
    assert out.topk_weights.is_untouched()
    assert out.topk_ids.is_untouched()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        pytest.param(lambda x: x[0], ValueError, r"must be \[T, E\], got shape \[16\]; flatten", id="rank_1"),
        pytest.param(lambda x: x[None], ValueError, r"must be \[T, E\], got shape \[1, 3, 16\]; flatten", id="rank_3"),
        pytest.param(
            lambda x: x[:, :15], ValueError, "has 15 columns, the spec has num_experts=16", id="fewer_columns"
        ),
        pytest.param(
            lambda x: x.int(), ValueError, "must be float32, bfloat16 or float16, got torch.int32", id="integers"
        ),
        pytest.param(lambda x: x.double(), ValueError, "float16, got torch.float64", id="float64"),
        pytest.param(lambda x: x.tile(1, 2)[:, ::2], ValueError, "must have contiguous rows", id="columns_apart"),
        pytest.param(
            lambda x: x.t().contiguous().t(), ValueError, r"strides \(1, 3\); rows may lie apart", id="transposed"
        ),
        pytest.param(
            lambda x: x.requires_grad_(), ValueError, "requires grad.*inference only.*no_grad", id="requires_grad"
        ),
        pytest.param(lambda x: x.tolist(), TypeError, r"must be a tensor \[T, E\], got list", id="a_list"),
    ],
)
def test_logits(change, error, match, impl, device):
    refused(error, match, impl, device, logits=change(make_logits("normal", 3, 16, device=device)))


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        (None, "has per_expert_scale=True, but .* is missing"),
        (torch.ones(15), r"per_expert_scale must be \[16\] of torch.float32 or .*, got \[15\] of torch.float32"),
        (torch.ones(16, dtype=torch.int64), r"float16, got \[16\] of torch.int64"),
        (torch.ones(16, requires_grad=True), "per_expert_scale requires grad.*inference only.*no_grad"),
    ],
    ids=["missing", "of_15", "integers", "requires_grad"],
)
def test_per_expert_scale(scale, match, impl, device):
    refused(ValueError, match, impl, device, spec=SCALED, per_expert_scale=scale)


def test_per_expert_scale_with_gaps(impl, device):
    inputs = turnout.RoutingInputs(per_expert_scale=torch.ones(32, device=device)[::2])
    with pytest.raises(ValueError, match=r"per_expert_scale must be contiguous, got strides \(2,\)"):
        turnout.route(make_logits("normal", 3, 16, device=device), SCALED, CONTRACT, inputs, impl=impl)


def test_per_expert_scale_that_the_spec_lacks(impl, device):
    match = "has per_expert_scale=False, but .* is given"
    refused(ValueError, match, impl, device, per_expert_scale=torch.ones(16))


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"is_padding": torch.zeros(4, dtype=torch.bool)}, r"is_padding must be \[3\] of torch.bool, got \[4\]"),
        ({"is_padding": torch.zeros(3, dtype=torch.uint8)}, r"torch.bool, got \[3\] of torch.uint8"),
        ({"num_valid_tokens": torch.ones(1, dtype=torch.int64)}, r"torch.int32, got \[1\] of torch.int64"),
        ({"num_valid_tokens": torch.ones((), dtype=torch.int32)}, r"num_valid_tokens must be \[1\] of .*, got \[\]"),
    ],
    ids=["mask_of_4", "mask_of_bytes", "count_of_int64", "scalar_count"],
)
def test_padding(inputs, match, impl, device):
    refused(ValueError, match, impl, device, contract=PADDED, **inputs)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_table_of_no_token_ids(num_tokens, impl, device):
    """Any token would be routed nowhere; refused for no tokens, too: a table is wrong before any comes."""
    tokens, table = torch.zeros(num_tokens, dtype=torch.int64), torch.empty(0, 4, dtype=torch.int64)
    inputs = turnout.RoutingInputs(input_ids=tokens.to(device), tid2eid=table.to(device))
    out = poisoned_out(num_tokens, 4, CONTRACT, device)
    spec = dataclasses.replace(SPEC, hash_routing=True)
    logits = make_logits("normal", num_tokens, 16, device=device)
    with pytest.raises(ValueError, match=r"tid2eid has no rows, .* one for each token id"):
        turnout.route(logits, spec, CONTRACT, inputs, out=out.tensors, impl=impl)
    assert out.topk_weights.is_untouched()
    assert out.topk_ids.is_untouched()


@pytest.mark.parametrize("shape", [(), (8,), (8, 4, 1)], ids=str)
def test_a_table_of_another_rank(shape, impl, device):
    given = {"input_ids": torch.zeros(3, dtype=torch.int64), "tid2eid": torch.zeros(shape, dtype=torch.int64)}
    spec = dataclasses.replace(SPEC, hash_routing=True)
    refused(ValueError, r"tid2eid must be \[any, 4\] of", impl, device, spec=spec, **given)


@pytest.mark.parametrize("name", ["is_padding", "num_valid_tokens"])
def test_padding_without_a_sentinel(name, impl, device):
    given = {"is_padding": torch.zeros(3, dtype=torch.bool), "num_valid_tokens": torch.ones(1, dtype=torch.int32)}
    match = "padding needs a contract with a sentinel, and this one has sentinel=None; give"
    refused(ValueError, match, impl, device, **{name: given[name]})


def test_sentinel_that_is_an_expert(impl, device):
    contract = dataclasses.replace(CONTRACT, sentinel=3)
    refused(ValueError, r"sentinel=3 is the id of an expert \(num_experts=16\)", impl, device, contract=contract)


def test_ids_dtype_too_small(impl, device):
    int16 = turnout.Contract(ids_dtype=torch.int16)
    many = turnout.RouterSpec(num_experts=40000, top_k=4)
    logits = torch.zeros(3, 40000, device=device)
    refused(ValueError, "int16 cannot hold the ids of 40000", impl, device, logits=logits, spec=many, contract=int16)
    past = turnout.Contract(ids_dtype=torch.int16, sentinel="num_experts")
    most = turnout.RouterSpec(num_experts=32768, top_k=4)
    logits = torch.zeros(3, 32768, device=device)
    refused(ValueError, "int16 cannot hold the sentinel 32768", impl, device, logits=logits, spec=most, contract=past)


def test_arguments_of_another_type(impl, device):
    refused(TypeError, "spec must be a turnout.RouterSpec, got dict", impl, device, spec={"num_experts": 16})
    refused(TypeError, "per_expert_scale must be a tensor, got float", impl, device, spec=SCALED, per_expert_scale=1.0)
    logits = make_logits("normal", 3, 16, device=device)
    with pytest.raises(TypeError, match=r"contract must be a turnout.Contract, got str; turnout.contracts\[name\]"):
        turnout.route(logits, SPEC, "transformers.eager", impl=impl)
    with pytest.raises(TypeError, match=r"inputs must be a turnout\.RoutingInputs, got Tensor"):
        turnout.route(logits, SPEC, CONTRACT, torch.ones(16), impl=impl)


def test_mixed_devices(impl, device):
    """``meta`` stands in for a second device, which every machine has."""
    meta = torch.ones(16, device="meta")
    logits = make_logits("normal", 3, 16, device=device)
    with pytest.raises(ValueError, match=r"per_expert_scale is on meta, router_logits on .*; move one of them"):
        turnout.route(logits, SCALED, CONTRACT, turnout.RoutingInputs(per_expert_scale=meta), impl=impl)
    out = (torch.empty(3, 4, device=device), torch.empty(3, 4, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"out\.topk_ids is on meta, router_logits on"):
        turnout.route(logits, SPEC, CONTRACT, out=out, impl=impl)


@pytest.mark.parametrize("which", [0, 1], ids=["topk_weights", "topk_ids"])
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        pytest.param(
            lambda x: x.to(torch.float16), r"must be \[3, 4\] of torch.* got \[3, 4\] of torch.float16", id="dtype"
        ),
        pytest.param(lambda x: x[:2], r"must be \[3, 4\] of .* got \[2, 4\]", id="fewer_rows"),
        pytest.param(lambda x: x.flatten(), r"must be \[3, 4\] of .* got \[12\]", id="flat"),
        pytest.param(lambda x: x.t().contiguous().t(), r"must be contiguous, got strides \(1, 3\)", id="strides"),
        pytest.param(lambda x: x.tolist(), "must be a tensor, got list", id="a_list"),
    ],
)
def test_out(which, wrong, match, impl, device):
    good = poisoned_out(3, 4, CONTRACT, device)
    out = list(good.tensors[:2])
    out[which] = wrong(out[which])
    with pytest.raises((ValueError, TypeError), match=rf"out\.{('topk_weights', 'topk_ids')[which]} {match}"):
        turnout.route(make_logits("normal", 3, 16, device=device), SPEC, CONTRACT, out=out, impl=impl)
    assert good.topk_weights.is_untouched()
    assert good.topk_ids.is_untouched()


def test_out_of_one_buffer(impl, device):
    with pytest.raises(ValueError, match="out must hold topk_weights and topk_ids, got 1 buffers"):
        turnout.route(make_logits("normal", 3, 16, device=device), SPEC, CONTRACT, out=[torch.empty(3, 4)], impl=impl)


@pytest.mark.parametrize("name", ["cuda", "Triton", "", "numba"])
def test_unknown_impl(name):
    refused(ValueError, f"impl must be one of auto, reference, triton, cpu; got '{name}'", name, "cpu")


def test_cpu_impl_of_another_device():
    from turnout.routing import cpu

    meta = torch.empty(3, 16, device="meta")
    with pytest.raises(ValueError, match="needs logits on a CPU, got meta; use impl='triton' or impl='auto'"):
        cpu.launch(meta, SPEC, CONTRACT, (None,) * 4, meta[:, :4], meta[:, :4])


def test_triton_without_a_gpu_or_the_interpreter():
    script = """
        import torch, turnout
        logits = torch.zeros(3, 16)
        turnout.route(logits, turnout.RouterSpec(num_experts=16, top_k=4), turnout.Contract(), impl="triton")
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "ValueError: impl='triton' needs logits on a GPU, got a CPU tensor; use impl='cpu'" in run.stderr


def test_more_experts_than_a_tile_holds(kernel_device):
    """The kernel holds rows whole, up to 1024 experts; a named impl says so, and auto takes another."""
    pytest.importorskip("triton", reason="triton is not installed")
    spec = turnout.RouterSpec(num_experts=1025, top_k=2)
    logits = torch.arange(1025.0, device=kernel_device)[None]
    with pytest.raises(ValueError, match="at most 1024 experts, got 1025; use impl='reference'"):
        turnout.route(logits, spec, CONTRACT, impl="triton")
    assert turnout.route(logits, spec, CONTRACT).topk_ids.tolist() == [[1024, 1023]]
