"""Bad input to `turnout.permute`, and to `turnout.route` with structures: a sentence that says what to do."""

import dataclasses

import pytest
import torch

import turnout
from turnout.permutation import api
from turnout.testing.inputs import make_logits
from turnout.testing.permutation import make_ids

CONTRACT = turnout.Contract(structures=("permuted_idx",), sentinel=-1)
WEIGHED = turnout.Contract(structures=("permuted_weights",), weights_dtype=torch.bfloat16)
SPEC = turnout.RouterSpec(num_experts=8, top_k=2, renormalize=True)
IDS = make_ids("uniform", 4, 8, 2)


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        (IDS.float(), ValueError, r"topk_ids must be \[any, any\] of torch.int16 or .* got \[4, 2\] of torch.float32"),
        (IDS.flatten(), ValueError, r"topk_ids must be \[any, any\] of .* got \[8\]"),
        (IDS.t().contiguous().t(), ValueError, r"topk_ids must be contiguous, got strides \(1, 4\); pass topk_ids.con"),
        (IDS[:, :0], ValueError, r"topk_ids must be \[T, K\] with K of at least 1, got \[4, 0\]"),
        (IDS.tolist(), TypeError, "topk_ids must be a tensor, got list"),
    ],
    ids=["floats", "flat", "transposed", "no_experts", "a_list"],
)
def test_ids(ids, error, match):
    with pytest.raises(error, match=match):
        turnout.permute(ids, 8, CONTRACT)


@pytest.mark.parametrize("num_experts", [0, -1, 8.0, True])
def test_number_of_experts(num_experts):
    with pytest.raises(ValueError, match="num_experts must be a positive int, got"):
        turnout.permute(IDS, num_experts, CONTRACT)


def test_a_contract_of_another_kind():
    with pytest.raises(TypeError, match=r"contract must be a turnout.Contract, got str"):
        turnout.permute(IDS, 8, "vllm.marlin")
    with pytest.raises(ValueError, match=r"asks for no structures; name them: Contract\(structures="):
        turnout.permute(IDS, 8, turnout.Contract())


@pytest.mark.parametrize("name", ["vllm.marlin", "sglang.moe_align", "aiter.moe_sorting"])
def test_a_block_map_of_unknown_size_is_refused_by_name(name):
    """The catalogue's contracts leave the size to the call; route and permute need to know it."""
    contract = turnout.contracts[name]
    match = r"asks for sorted_token_ids, .* block_size=None: .*dataclasses.replace\(contract, block_size=64\)"
    with pytest.raises(ValueError, match=match):
        turnout.permute(IDS, 8, contract)
    with pytest.raises(ValueError, match=match):
        turnout.route(torch.zeros(4, 8), SPEC, contract)
    sized = dataclasses.replace(contract, block_size=64)
    assert turnout.route(torch.zeros(4, 8), SPEC, sized).sorted_token_ids.shape == (512,)


def test_weights_that_are_missing_or_of_no_use():
    weights = torch.ones(4, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="asks for permuted_weights, but topk_weights is missing"):
        turnout.permute(IDS, 8, WEIGHED)
    with pytest.raises(ValueError, match="asks for no permuted_weights, but topk_weights is given"):
        turnout.permute(IDS, 8, CONTRACT, topk_weights=weights)
    with pytest.raises(ValueError, match=r"topk_weights must be \[4, 2\] of torch.bfloat16, got \[4, 2\] of torch.fl"):
        turnout.permute(IDS, 8, WEIGHED, topk_weights=weights.float())
    with pytest.raises(ValueError, match=r"topk_weights requires grad.*inference only"):
        turnout.permute(IDS, 8, WEIGHED, topk_weights=weights.clone().requires_grad_())
    with pytest.raises(ValueError, match="topk_weights is on meta, topk_ids on cpu"):
        turnout.permute(IDS, 8, WEIGHED, topk_weights=weights.to("meta"))


def test_more_slots_than_positions():
    """2^31 and more, padding included; ids without data stand in for those of 8 GB."""
    ids = torch.empty(2**29, 4, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"536870912 tokens of 4 experts .* more than 2147483647 positions; split"):
        turnout.permute(ids, 8, CONTRACT)
    padded = turnout.Contract(structures=("expert_ids",), block_size=2**28)
    with pytest.raises(ValueError, match="in blocks of 268435456 slots are more than"):
        turnout.permute(torch.empty(4, 2, dtype=torch.int32, device="meta"), 8, padded)
    scheduled = turnout.Contract(structures=("block_schedule",))
    with pytest.raises(ValueError, match=r"block_schedule numbers .* fewer than 524288 tokens, got 524288; split"):
        turnout.permute(torch.empty(2**19, 1, dtype=torch.int32, device="meta"), 8, scheduled)
    fits = turnout.permute(torch.empty(2**19 - 1, 1, dtype=torch.int32, device="meta"), 8, scheduled, impl="triton")
    assert fits.block_schedule.shape == (5, 32775)


@pytest.mark.parametrize("name", ["cuda", "Triton", ""])
def test_unknown_impl(name):
    with pytest.raises(ValueError, match=f"impl must be one of auto, reference, triton, cpu; got '{name}'"):
        turnout.permute(IDS, 8, CONTRACT, impl=name)


def test_more_experts_than_a_tile_holds(kernel_device):
    pytest.importorskip("triton", reason="triton is not installed")
    ids = torch.tensor([[1024, 0]], device=kernel_device)
    with pytest.raises(ValueError, match="at most 1024 experts, got 1025; use impl='reference'"):
        turnout.permute(ids, 1025, CONTRACT, impl="triton")
    assert turnout.permute(ids, 1025, CONTRACT).permuted_idx.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("device_type", "num_experts", "impl"),
    [("cpu", 2000, "cpu"), ("meta", 8, "reference")],
)
def test_auto_chooses_by_device_and_size_and_says_why(device_type, num_experts, impl):
    choice = api.choose_impl(torch.empty(2, 2, dtype=torch.int32, device=device_type), num_experts)
    assert choice.impl == impl
    assert choice.reason


def test_route_does_not_write_structures_into_buffers():
    out = (torch.empty(3, 2), torch.empty(3, 2, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="does not write permuted_idx into buffers yet; leave out= away"):
        turnout.route(make_logits("normal", 3, 8), SPEC, CONTRACT, out=out)


def test_local_ids_need_their_number_and_a_map():
    logits, expert_map = make_logits("normal", 3, 8), torch.zeros(8, dtype=torch.int32)
    local = turnout.Contract(id_space="local", sentinel=-1, num_local_experts=4)
    inputs = turnout.RoutingInputs(expert_map=expert_map)
    with pytest.raises(ValueError, match=r"num_local_experts=None; say how many .*replace\(contract, num_local_exp"):
        turnout.route(logits, SPEC, turnout.contracts["transformers.expert_parallel.local"], inputs)
    with pytest.raises(ValueError, match=r"id_space='local', but RoutingInputs\.expert_map is missing"):
        turnout.route(logits, SPEC, local)
    with pytest.raises(ValueError, match=r"id_space='logical', but RoutingInputs\.expert_map is given"):
        turnout.route(logits, SPEC, turnout.Contract(), inputs)
    with pytest.raises(ValueError, match=r"expert_map must be \[8\] of torch.int32, got \[7\] of torch.int32"):
        turnout.route(logits, SPEC, local, turnout.RoutingInputs(expert_map=expert_map[:7]))
    with pytest.raises(ValueError, match=r"sentinel=3 is the id of an expert \(num_experts=4\)"):
        turnout.route(logits, SPEC, dataclasses.replace(local, sentinel=3), inputs)
    with pytest.raises(ValueError, match="num_local_experts=4 contradicts id_space='logical'"):
        turnout.Contract(num_local_experts=4)
    with pytest.raises(ValueError, match=r"id_space='physical', but RoutingInputs\.logical_to_physical_map is missing"):
        turnout.route(logits, SPEC, turnout.Contract(id_space="physical"))


def test_cpu_impl_of_another_device():
    ids = torch.empty(3, 2, dtype=torch.int32, device="meta")
    from turnout.permutation import cpu

    with pytest.raises(ValueError, match="needs ids on a CPU, got meta; use impl='triton' or impl='auto'"):
        cpu.launch(ids, None, 8, CONTRACT, turnout.Permutation())
