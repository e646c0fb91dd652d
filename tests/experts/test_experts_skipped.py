"""Slots that carry no work: their id is no expert, or their weight is 0. What lies behind them is never seen."""

import dataclasses

import pytest
import torch

import turnout
from turnout.testing.experts import ExpertsCase, assert_within_tolerance, oracle, plain_run

NAN = float("nan")
EACH_SENTINEL = pytest.mark.parametrize(
    ("sentinel", "weight"),
    [
        pytest.param(-1, 0.0, id="minus_one"),
        pytest.param("num_experts", 0.0, id="num_experts"),
        pytest.param(-1, 0.5, id="minus_one_with_a_weight"),
        pytest.param(1000, 0.5, id="far_out_with_a_weight"),
        pytest.param(None, 0.0, id="an_expert_with_weight_0"),
    ],
)


def skipping(inputs, is_skipped, sentinel, weight):
    """The inputs with some slots skipped: another id, another weight."""
    ids, weights = inputs.routing.topk_ids.clone(), inputs.routing.topk_weights.clone()
    if sentinel is not None:
        ids[is_skipped] = len(inputs.weights.down_proj) if sentinel == "num_experts" else sentinel
    weights[is_skipped] = weight
    return dataclasses.replace(inputs, routing=turnout.Routing(weights, ids))


def without(inputs, is_skipped):
    """The same for oracle and plain run: what is skipped has weight 0, and nothing else about it is odd."""
    weights = inputs.routing.topk_weights.masked_fill(is_skipped, 0.0)
    return dataclasses.replace(inputs, routing=inputs.routing._replace(topk_weights=weights))


@EACH_SENTINEL
@pytest.mark.parametrize("spec", ["gelu_tanh", "gpt_oss"])
def test_skipped_slots_count_nothing(spec, sentinel, weight, impl, modes, device):
    clean = ExpertsCase(num_tokens=5, spec=spec).make(device)
    is_skipped = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [0, 0]], dtype=torch.bool, device=device)
    inputs, kept = skipping(clean, is_skipped, sentinel, weight), without(clean, is_skipped)
    for batch_invariant in modes:
        out = turnout.experts(*inputs.arguments, impl=impl, batch_invariant=batch_invariant)
        assert_within_tolerance(out, oracle(kept), plain_run(kept))
        assert (out[2] == 0).all()


@EACH_SENTINEL
def test_nan_in_a_skipped_row_does_not_leak(sentinel, weight, impl, modes, device):
    clean = ExpertsCase(num_tokens=5).make(device)
    is_skipped = torch.zeros(5, 2, dtype=torch.bool, device=device)
    is_skipped[2:4] = True
    hidden_states = clean.hidden_states.masked_fill(is_skipped[:, :1], NAN)
    inputs = skipping(dataclasses.replace(clean, hidden_states=hidden_states), is_skipped, sentinel, weight)
    kept = without(clean, is_skipped)
    for batch_invariant in modes:
        out = turnout.experts(*inputs.arguments, impl=impl, batch_invariant=batch_invariant)
        assert_within_tolerance(out, oracle(kept), plain_run(kept))


@pytest.mark.parametrize("num_tokens", [1, 9, 70])
def test_nan_in_an_expert_that_nobody_chose_does_not_leak(num_tokens, impl, modes, device, is_interpreted):
    if is_interpreted and num_tokens > 9:
        pytest.skip("hundreds of programs in Triton's interpreter; the same runs natively on a GPU")
    clean = ExpertsCase(num_tokens=num_tokens, routing="empty_experts", spec="gelu").make(device)
    unused = torch.ones(6, dtype=torch.bool, device=device)
    unused[clean.routing.topk_ids.long().flatten()] = False
    assert unused.any()
    weights = [None if w is None else w.clone() for w in clean.weights]
    for weight in weights:
        if weight is not None:
            weight[unused] = NAN
    inputs = dataclasses.replace(clean, weights=turnout.ExpertsWeights(*weights))
    for batch_invariant in modes:
        out = turnout.experts(*inputs.arguments, impl=impl, batch_invariant=batch_invariant)
        assert_within_tolerance(out, oracle(clean), plain_run(clean))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["hidden_states", "gate_up_proj", "down_proj", "topk_weights"])
def test_nan_that_is_chosen_shows(where, dtype, impl, device, is_interpreted):
    """Wrong numbers are not tidied up: a row that meets NaN is NaN, and no other is."""
    if is_interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    inputs = ExpertsCase(num_tokens=4, top_k=2, dtype=dtype).make(device)
    expert = int(inputs.routing.topk_ids[1, 1])
    is_hit = (inputs.routing.topk_ids == expert).any(dim=1)
    if where == "hidden_states":
        inputs.hidden_states[1, 3] = NAN
    elif where == "topk_weights":
        inputs.routing.topk_weights[1, 1] = NAN
    else:
        getattr(inputs.weights, where)[expert] = NAN
    if where in ("hidden_states", "topk_weights"):
        is_hit = torch.arange(4, device=device) == 1
    out = turnout.experts(*inputs.arguments, impl=impl)
    assert out[is_hit].isnan().all()
    assert out[~is_hit].isfinite().all()


def test_no_token_has_an_expert(impl, device):
    inputs = ExpertsCase(num_tokens=3).make(device)
    nobody = inputs.routing._replace(topk_ids=torch.full_like(inputs.routing.topk_ids, -1))
    out = turnout.experts(inputs.hidden_states * NAN, inputs.weights, nobody, inputs.spec, impl=impl)
    assert (out == 0).all()
