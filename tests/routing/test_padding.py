"""Padding rows: the contract's sentinel and weight exactly 0, whatever lies in them."""

import pytest
import torch

import turnout
from turnout.contracts import IDS_DTYPES
from turnout.testing.checks import assert_bitwise_equal
from turnout.testing.inputs import every_kind_of_row, make_logits

SPEC = turnout.RouterSpec(num_experts=60, top_k=6, renormalize=True, per_expert_scale=True)
SENTINELS = [(-1, torch.int16), (-1, torch.int32), (-1, torch.int64), (60, torch.int64), (0xFFFF, torch.uint32)]


def padded(device, is_padding=None, num_valid_tokens=None):
    return turnout.RoutingInputs(
        per_expert_scale=torch.full((60,), float("1e30"), device=device),
        is_padding=None if is_padding is None else torch.tensor(is_padding, device=device),
        num_valid_tokens=None
        if num_valid_tokens is None
        else torch.tensor([num_valid_tokens], dtype=torch.int32, device=device),
    )


@pytest.mark.parametrize(("sentinel", "ids_dtype"), [*SENTINELS, *(("num_experts", dtype) for dtype in IDS_DTYPES)])
def test_sentinel(sentinel, ids_dtype, device, routed):
    contract = turnout.Contract(ids_dtype=ids_dtype, sentinel=sentinel)
    logits = make_logits("normal", 5, 60, device=device)
    routing = routed(logits, SPEC, contract, padded(device, is_padding=[False, True, True, False, True]))
    assert routing.topk_ids[1].tolist() == [60 if sentinel == "num_experts" else sentinel] * 6


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_lies_in_padding_rows_does_not_matter(weights_dtype, device, routed):
    contract = turnout.Contract(sentinel=-1, weights_dtype=weights_dtype)
    logits = every_kind_of_row(60, device=device)
    spec = turnout.RouterSpec(num_experts=60, top_k=6)
    routing = routed(
        logits,
        spec,
        contract,
        turnout.RoutingInputs(is_padding=torch.ones(len(logits), dtype=torch.bool, device=device)),
    )
    assert (routing.topk_weights.view(torch.uint8) == 0).all()


@pytest.mark.parametrize("num_valid_tokens", [0, 1, 16, 17, 40, 1000])
def test_number_of_valid_tokens(num_valid_tokens, device, routed):
    """From 0 to more than T; 16 and 17 lie at the edge of a tile."""
    logits = make_logits("normal", 40, 60, device=device)
    contract = turnout.Contract(sentinel="num_experts")
    routing = routed(logits, SPEC, contract, padded(device, num_valid_tokens=num_valid_tokens))
    assert int((routing.topk_ids[:, 0] == 60).sum()) == max(0, 40 - num_valid_tokens)


def test_mask_and_count_together(device, routed):
    logits = make_logits("normal", 4, 60, device=device)
    contract = turnout.Contract(sentinel=-1)
    routing = routed(logits, SPEC, contract, padded(device, [True, False, False, False], num_valid_tokens=3))
    assert (routing.topk_ids[:, 0] == -1).tolist() == [True, False, False, True]


def test_no_row_is_padding(impl, device):
    """A mask of zeros changes nothing."""
    logits = make_logits("normal", 4, 60, device=device)
    contract = turnout.Contract(sentinel=-1)
    masked = turnout.route(logits, SPEC, contract, padded(device, [False] * 4), impl=impl)
    assert_bitwise_equal(masked, turnout.route(logits, SPEC, contract, padded(device), impl=impl))
