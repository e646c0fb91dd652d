"""The checks check: a right routing with one planted fault is found out."""

import pytest
import torch

import turnout
from turnout.testing.checks import assert_matches_oracle, assert_routing_valid, oracle
from turnout.testing.inputs import NAMED_LOGITS, make_logits, poisoned_out

SPEC = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
CONTRACT = turnout.Contract(ids_dtype=torch.int64, sentinel=-1)
PADDED = turnout.RoutingInputs(is_padding=torch.tensor([False, False, True]))
CHECKS = pytest.mark.parametrize("check", [assert_routing_valid, assert_matches_oracle])


def right_routing():
    logits = make_logits("tie_free", 3, 16)
    return logits, turnout.route(logits, SPEC, CONTRACT, PADDED, impl="reference")


def swap_first_two(x):
    x[0, [0, 1]] = x[0, [1, 0]]


def plant(row, column, value):
    def fault(x):
        x[row, column] = value

    return fault


@CHECKS
@pytest.mark.parametrize(
    ("field", "fault"),
    [
        pytest.param("topk_ids", swap_first_two, id="two_ids_swapped"),
        pytest.param("topk_ids", lambda x: x[0, 1:2].copy_(x[0, :1]), id="an_id_twice"),
        pytest.param("topk_ids", lambda x: x[0, 3:].copy_((x[0, 3:] + 1) % 16), id="another_expert"),
        pytest.param("topk_ids", plant(1, 3, 16), id="id_past_the_last"),
        pytest.param("topk_ids", plant(2, 0, 0), id="padding_routed"),
        pytest.param("topk_weights", plant(2, 1, 1e-9), id="padding_weighs"),
        pytest.param("topk_weights", plant(0, 0, float("nan")), id="nan_weight"),
        pytest.param("topk_weights", plant(0, 3, float("inf")), id="infinite_weight"),
        pytest.param("topk_weights", plant(1, 2, -0.25), id="negative_weight"),
        pytest.param("topk_weights", lambda x: x.mul_(1.00001), id="sum_too_large"),
    ],
)
def test_a_planted_fault_is_found(field, fault, check):
    logits, routing = right_routing()
    check(routing, logits, SPEC, CONTRACT, PADDED)
    fault(getattr(routing, field))
    with pytest.raises(AssertionError):
        check(routing, logits, SPEC, CONTRACT, PADDED)


@CHECKS
def test_another_form_is_found(check):
    logits, (weights, ids, *_) = right_routing()
    wrong_forms = [(weights.half(), ids), (weights, ids.int()), (weights[:2], ids), (weights.t().contiguous().t(), ids)]
    for wrong in wrong_forms:
        with pytest.raises(AssertionError, match=r"topk_(weights|ids)"):
            check(turnout.Routing(*wrong), logits, SPEC, CONTRACT, PADDED)


def test_ties_in_another_order_are_found():
    logits = torch.zeros(1, 16)
    weights = torch.full((1, 4), 0.25)
    assert_routing_valid(turnout.Routing(weights, torch.tensor([[0, 1, 2, 3]])), logits, SPEC, CONTRACT)
    for ids in ([1, 0, 2, 3], [0, 1, 2, 4]):
        with pytest.raises(AssertionError):
            assert_routing_valid(turnout.Routing(weights, torch.tensor([ids])), logits, SPEC, CONTRACT)


def test_a_weight_truncated_to_16_bits_is_found():
    """One rounding is to nearest: a truncated weight is as wrong as one rounded twice."""
    contract = turnout.Contract(ids_dtype=torch.int64, weights_dtype=torch.bfloat16)
    logits = make_logits("normal", 8, 16)
    routing = turnout.route(logits, SPEC, contract, impl="reference")
    assert_matches_oracle(routing, logits, SPEC, contract)
    exact = turnout.route(logits, SPEC, CONTRACT, impl="reference").topk_weights
    truncated = (exact.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    with pytest.raises(AssertionError, match="weights of rows"):
        assert_matches_oracle(turnout.Routing(truncated, routing.topk_ids), logits, SPEC, contract)


def test_oracle_by_hand():
    """The rules in numbers small enough to read."""
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, nan, 0.0, -inf], [inf, 1.0, inf, 2.0], [nan, -inf, nan, -inf], [-0.0, 0.0, -1.0, nan]])
    spec = turnout.RouterSpec(num_experts=4, top_k=3, renormalize=True)
    weights, ids = oracle(logits, spec)
    assert ids.tolist() == [[0, 2, 3], [0, 2, 3], [1, 3, 0], [0, 1, 2]]
    assert weights[:3].round(6).tolist() == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.333333, 0.333333, 0.333333]]
    as_they_are = turnout.RouterSpec(num_experts=4, top_k=1)
    assert oracle(logits, as_they_are)[0].round(6).tolist() == [[0.5], [0.5], [1.0], [0.422319]]


def test_a_write_beside_the_buffer_is_seen():
    out = poisoned_out(3, 4, CONTRACT)
    assert out.topk_ids.is_untouched()
    out.topk_ids.tensor.zero_()
    assert not out.topk_ids.is_untouched()
    assert out.topk_ids.guards_hold()
    beside = out.topk_ids.tensor.as_strided((13,), (1,), out.topk_ids.tensor.storage_offset() - 1)
    beside[0] = 7
    assert not out.topk_ids.guards_hold()


@pytest.mark.parametrize("name", NAMED_LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_named_logits_are_what_they_say(name, dtype):
    logits = make_logits(name, 8, 60, dtype)
    assert (logits.shape, logits.dtype) == ((8, 60), dtype)
    assert torch.equal(logits.view(torch.uint8), make_logits(name, 8, 60, dtype).view(torch.uint8))
    finite = logits.isfinite().sum(dim=1)
    assert {
        "tie_free": all(len(row.unique()) == 60 for row in logits),
        "all_equal": len(logits.unique()) == 1,
        "all_negative": bool((logits < 0).all()),
        "signed_zeros": bool((logits == 0).all()) and len(logits.view(torch.uint8).unique()) > 1,
        "subnormal": bool((logits.abs() < torch.finfo(dtype).tiny).all()),
        "one_nan": bool((finite == 59).all()),
        "all_nan": bool(logits.isnan().all()),
        "one_inf": bool(((logits == torch.inf).sum(dim=1) == 1).all()),
        "all_minus_inf": bool((logits == -torch.inf).all()),
        "one_finite": bool((finite == 1).all()),
        "few_finite": bool((finite == 3).all()),
    }.get(name, True)
