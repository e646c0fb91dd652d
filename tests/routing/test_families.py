"""Routers of every family against their formulas in float64, written here once more, and against the reference's ids.

Which experts a float32 score chooses is decided by its last bits where two are near: there the formula leaves both, and
the reference says which.
"""

import dataclasses

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import turnout
from turnout.testing.inputs import every_kind_of_row, make_logits, poisoned_out

CONTRACT = turnout.Contract(ids_dtype=torch.int64, sentinel=-1)
NEAR = 1e-6  # of what is ranked, and of a weight
TINY = 1e-17  # what is left of scores below exp(-87), which count as 0, divided by an epsilon of 1e-20

BIASED = {"scoring_func": "sigmoid", "e_score_correction_bias": True, "renormalize": True, "renormalize_eps": 1e-20}
GROUPS = {"num_experts": 32, "top_k": 6, "num_expert_group": 8, "topk_group": 4}
FIELDS = {
    "deepseek_v3": {**GROUPS, **BIASED, "group_score": "top2_sum", "routed_scaling_factor": 2.5},
    "deepseek_v3_fill_zero": {**GROUPS, **BIASED, "group_score": "top2_sum", "group_fill": "zero"},
    "deepseek_v2": {**GROUPS, "group_score": "max", "group_fill": "zero", "routed_scaling_factor": 16.0},
    "minimax_m2": {"num_experts": 16, "top_k": 4, **BIASED},
    "ernie4_5": {"num_experts": 16, "top_k": 6, **BIASED, "scoring_func": "softmax", "renormalize_eps": 0.0,
                 "renormalize_min": 1e-12},
    "gpt_oss": {"num_experts": 32, "top_k": 4, "scoring_func": "none", "selected_score": "softmax"},
    "llama4": {"num_experts": 16, "top_k": 1, "scoring_func": "none", "selected_score": "sigmoid"},
    "kolibri": {"num_experts": 16, "top_k": 4, "scoring_func": "none", "selected_score": "sigmoid",
                "e_score_correction_bias": True},
    "deepseek_v4": {"num_experts": 16, "top_k": 4, **BIASED, "scoring_func": "sqrtsoftplus", "score_dtype": "input",
                    "routed_scaling_factor": 1.5},
    "cohere": {"num_experts": 16, "top_k": 4, "logit_scale": 0.0625, "logit_softcap": 30.0, "scoring_func": "sigmoid",
               "renormalize": True, "renormalize_eps": 1e-20},
    "divided": {"num_experts": 17, "top_k": 3, "scoring_func": "sigmoid", "divide_by_top_k": True},
}  # fmt: skip
SPECS = {name: turnout.RouterSpec(**fields) for name, fields in FIELDS.items()}
HASHED = turnout.RouterSpec(
    num_experts=16, top_k=4, scoring_func="sqrtsoftplus", hash_routing=True, renormalize=True, renormalize_eps=1e-20,
    routed_scaling_factor=1.5,
)  # fmt: skip
PLAIN = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
EXTREMES = np.errstate(invalid="ignore")  # infinities are subtracted on purpose
EACH_FAMILY = pytest.mark.parametrize("family", SPECS)
KINDS = (
    "normal", "quantised", "all_equal", "all_negative", "large_spread", "bit_patterns", "one_nan", "some_infs",
    "all_minus_inf", "few_finite", "not_finite", "all_nan",
)  # fmt: skip


def inputs_of(spec, device, **further):
    bias = None
    if spec.e_score_correction_bias:
        rng = torch.Generator().manual_seed(7)
        bias = (0.5 * torch.randn(spec.num_experts, generator=rng)).to(device)
    return turnout.RoutingInputs(e_score_correction_bias=bias, **further)


def float64(tensor):
    return tensor.detach().cpu().double().numpy()


def exp(x):
    return np.where(x < -87, 0.0, np.exp(np.minimum(x, 700)))


def values_of(logits, spec):
    """Logits in float64, NaN as -inf, scaled and capped."""
    values = float64(logits)
    values = np.where(np.isnan(values), -np.inf, values) * spec.logit_scale
    return values if spec.logit_softcap is None else spec.logit_softcap * np.tanh(values / spec.logit_softcap)


def softmax(values, top_k):
    """Infinite entries share alike; nothing but -inf gives 1 / K to each."""
    best = values.max(axis=1, keepdims=True)
    mass = np.where(values == best, 1.0, np.exp(np.where(values == best, 0.0, values - best)))
    return mass / np.where(best == -np.inf, top_k, mass.sum(axis=1, keepdims=True))


def scores_of(values, spec, dtype):
    if spec.scoring_func == "softmax":
        scores = softmax(values, spec.top_k)
    elif spec.scoring_func == "sigmoid":
        scores = 1 / (1 + exp(-values)) * (values >= -87)
    elif spec.scoring_func == "sqrtsoftplus":
        scores = np.sqrt(np.maximum(values, 0) + np.log1p(exp(-np.abs(values))))
    else:
        scores = values
    dtype = dtype if spec.score_dtype == "input" else torch.float32
    scores = np.clip(scores, torch.finfo(dtype).min, torch.finfo(dtype).max)
    return float64(torch.from_numpy(scores).float().to(dtype)) if spec.score_dtype == "input" else scores


def descending(values):
    """A stable sort of each row with NaN last."""
    return np.lexsort((-np.where(np.isnan(values), 0.0, values), np.isnan(values)), axis=-1)


@EXTREMES
def selected(logits, spec, bias):
    """Ids, what they were ranked by, and in which rows no two groups at the border are near without being equal."""
    ranked, decided = float64(logits), np.ones(len(logits), dtype=bool)
    if spec.ranks_scores:
        scores = scores_of(values_of(logits, spec), spec, logits.dtype)
        scores = scores if bias is None else scores + float64(bias)
        ranked = np.where(np.isnan(ranked), np.nan, scores)
    if spec.num_expert_group > 1:
        grouped = ranked.reshape(len(ranked), spec.num_expert_group, -1)
        best = np.take_along_axis(grouped, descending(grouped)[:, :, :2], axis=2)
        group_scores = best[:, :, 0] if spec.group_score == "max" else best.sum(axis=2)
        order = descending(group_scores)
        last, first_out = (group_scores[np.arange(len(order)), order[:, spec.topk_group - i]] for i in (1, 0))
        decided = ~(spec.ranks_scores & (np.abs(last - first_out) < NEAR))
        is_kept = (order[:, : spec.topk_group, None] == np.arange(spec.num_expert_group)).any(axis=1)
        fill = 0.0 if spec.ranks_scores and spec.group_fill == "zero" else -np.inf
        ranked = np.where(is_kept[:, :, None], grouped, fill).reshape(ranked.shape)
    return descending(ranked)[:, : spec.top_k], ranked, decided


def weights_of(logits, ids, spec):
    """The weights of given ids."""
    values = values_of(logits, spec)
    chosen = np.take_along_axis(values, ids, axis=1)
    if spec.selected_score == "softmax" or (spec.scoring_func == "softmax" and spec.weighs_by_shares):
        among_chosen = spec.renormalize or spec.selected_score == "softmax"
        weights = softmax(chosen, spec.top_k) if among_chosen else None
        weights = weights if among_chosen else np.take_along_axis(softmax(values, spec.top_k), ids, axis=1)
        return weights * spec.routed_scaling_factor
    if spec.selected_score == "sigmoid":
        weights = 1 / (1 + exp(-chosen)) * (chosen >= -87)
    else:
        weights = np.take_along_axis(scores_of(values, spec, logits.dtype), ids, axis=1)
    if spec.renormalize:
        total = np.maximum(weights.sum(axis=1, keepdims=True) + spec.renormalize_eps, spec.renormalize_min)
        weights = np.where(total == 0, 1 / spec.top_k, weights / np.where(total == 0, 1, total))
    return weights * spec.routed_scaling_factor / (spec.top_k if spec.divide_by_top_k else 1)


@EXTREMES
def assert_weights(routing, logits, spec):
    got, want = float64(routing.topk_weights), weights_of(logits, routing.topk_ids.cpu().numpy(), spec)
    # A softmax takes the difference of two logits, which float32 rounds: by one part in 2^24 of up to 30.
    shares = "softmax" in (spec.scoring_func, spec.selected_score)
    relative, absolute = (3 * NEAR, 0.2 * NEAR * spec.routed_scaling_factor) if shares else (NEAR, TINY)
    np.testing.assert_allclose(got, want, rtol=relative, atol=absolute)


def routed(logits, spec, inputs, impl):
    out = poisoned_out(len(logits), spec.top_k, CONTRACT, logits.device)
    routing = turnout.route(logits, spec, CONTRACT, inputs, out=out.tensors, impl=impl)
    assert all(buffer.guards_hold() for buffer in out)
    again = turnout.route(logits, spec, CONTRACT, inputs, impl=impl)
    assert torch.equal(routing.topk_ids, again.topk_ids)
    assert torch.equal(routing.topk_weights, again.topk_weights)
    want = turnout.route(logits, spec, CONTRACT, inputs, impl="reference")
    assert torch.equal(routing.topk_ids, want.topk_ids)
    return routing


def assert_as_the_formula(logits, spec, impl):
    inputs = inputs_of(spec, logits.device)
    routing = routed(logits, spec, inputs, impl)
    want, ranked, decided = selected(logits, spec, inputs.e_score_correction_bias)
    got = routing.topk_ids.cpu().numpy()
    assert all(len(set(row)) == spec.top_k for row in got.tolist())
    if spec.ranks_scores:
        ours, best = (np.take_along_axis(ranked, ids, axis=1)[decided] for ids in (got, want))
        np.testing.assert_allclose(ours, best, rtol=NEAR, atol=NEAR)
    else:
        np.testing.assert_array_equal(got, want)
    assert_weights(routing, logits, spec)
    return decided


@EACH_FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_row(family, dtype, impl, device):
    spec = SPECS[family]
    decided = assert_as_the_formula(every_kind_of_row(spec.num_experts, dtype, device, KINDS), spec, impl)
    assert decided[0], "a row of normal logits has groups of different scores"


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5", "gpt_oss", "kolibri", "deepseek_v4"])
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bits=arrays.arrays(np.int32, (8, 32), elements=st.integers(-(2**31), 2**31 - 1)))
def test_any_bits(family, impl, device, bits):
    spec = SPECS[family]
    logits = torch.from_numpy(bits)[:, : spec.num_experts].contiguous().view(torch.float32)
    assert_as_the_formula(logits.to(device), spec, impl)


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "ernie4_5", "kolibri", "deepseek_v4"])
def test_a_bias_chooses_and_does_not_weigh(family, impl, device):
    """The best experts by bias alone: they are chosen, and weigh what their scores say."""
    spec = SPECS[family]
    bias = torch.zeros(spec.num_experts, device=device)
    bias[: spec.top_k] = torch.arange(spec.top_k, 0, -1.0, device=device) * 100
    logits = make_logits("normal", 4, spec.num_experts, device=device)
    routing = routed(logits, spec, turnout.RoutingInputs(e_score_correction_bias=bias), impl)
    assert routing.topk_ids.tolist() == [list(range(spec.top_k))] * 4
    assert_weights(routing, logits, spec)


@pytest.mark.parametrize("family", ["minimax_m2", "gpt_oss", "divided"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_forced_ids_take_the_place_of_the_selection(family, dtype, impl, device):
    spec = SPECS[family]
    logits = make_logits("normal", 5, spec.num_experts, device=device)
    forced = torch.arange(5 * spec.top_k, device=device).view(5, spec.top_k) % spec.num_experts
    routing = routed(logits, spec, inputs_of(spec, device, forced_ids=forced.to(dtype)), impl)
    assert torch.equal(routing.topk_ids, forced)
    assert_weights(routing, logits, spec)


@pytest.mark.parametrize("no_expert", [-1, 16, 32767])
def test_a_forced_id_that_is_no_expert_is_the_sentinel(no_expert, impl, device):
    spec = SPECS["minimax_m2"]
    logits = make_logits("normal", 3, 16, device=device)
    forced = torch.tensor([[3, 1, no_expert, 0], [5, 6, 7, 8], [no_expert] * 4], dtype=torch.int32, device=device)
    routing = routed(logits, spec, inputs_of(spec, device, forced_ids=forced), impl)
    assert routing.topk_ids.tolist() == [[3, 1, -1, 0], [5, 6, 7, 8], [-1] * 4]
    assert (routing.topk_weights[routing.topk_ids < 0].view(torch.int32) == 0).all()
    assert (routing.topk_weights[routing.topk_ids >= 0] > 0).all()


@pytest.mark.parametrize("family", ["minimax_m2", "ernie4_5", "gpt_oss", "plain"])
def test_a_forced_id_that_is_no_expert_has_no_part_in_the_norm(family, impl, device):
    """The weights are those of the experts that remain, and no expert's score stands in for it."""
    spec = PLAIN if family == "plain" else SPECS[family]
    logits = make_logits("normal", 4, spec.num_experts, device=device)
    logits[:, 0] = 20  # of most weight, were it taken for what is no expert
    forced = torch.arange(1, 5, device=device)[:, None] + torch.arange(spec.top_k, device=device)
    forced.diagonal()[:] = torch.tensor([-1, spec.num_experts, -5, 32767], device=device)
    is_expert = (forced >= 0) & (forced < spec.num_experts)
    routing = routed(logits, spec, inputs_of(spec, device, forced_ids=forced), impl)
    assert torch.equal(routing.topk_ids, torch.where(is_expert, forced, -1))
    fewer = dataclasses.replace(spec, top_k=spec.top_k - 1)
    remaining = forced[is_expert].view(4, fewer.top_k).cpu().numpy()
    got = routing.topk_weights[is_expert].view(4, fewer.top_k)
    np.testing.assert_allclose(float64(got), weights_of(logits, remaining, fewer), rtol=3 * NEAR)
    assert (routing.topk_weights[~is_expert].view(torch.int32) == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_hash_routing_reads_a_table_by_token_id(dtype, impl, device):
    """DeepSeek V4's first layers; a token id that the table does not have has no experts."""
    logits = make_logits("normal", 6, 16, device=device)
    rng = torch.Generator().manual_seed(3)
    table = torch.rand(10, 16, generator=rng).argsort(dim=1)[:, :4].contiguous().to(device, dtype)
    tokens = torch.tensor([9, 0, 10, 4, -1, 4], dtype=dtype, device=device)
    routing = routed(logits, HASHED, turnout.RoutingInputs(input_ids=tokens, tid2eid=table), impl)
    known = torch.tensor([0, 1, 3, 5], device=device)
    assert torch.equal(routing.topk_ids[known], table[tokens[known].long()].long())
    assert_weights(turnout.Routing(routing.topk_weights[known], routing.topk_ids[known]), logits[known], HASHED)
    assert (routing.topk_ids[[2, 4]] == -1).all()
    assert (routing.topk_weights[[2, 4]].view(torch.int32) == 0).all()


def test_without_a_sentinel_an_unknown_token_has_id_0_and_weight_0(impl, device):
    logits = make_logits("normal", 1, 16, device=device)
    tokens, table = torch.tensor([2], device=device), torch.ones(2, 4, dtype=torch.int64, device=device)
    inputs = turnout.RoutingInputs(input_ids=tokens, tid2eid=table)
    routing = turnout.route(logits, HASHED, turnout.Contract(), inputs, impl=impl)
    assert routing.topk_ids.tolist() == [[0] * 4]
    assert routing.topk_weights.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_padding_is_the_sentinel_and_changes_no_other_row(family, impl, device):
    spec = SPECS[family]
    logits = make_logits("normal", 5, spec.num_experts, device=device)
    padding = torch.tensor([False, True, False, False, True], device=device)
    whole = routed(logits, spec, inputs_of(spec, device), impl)
    routing = routed(logits, spec, inputs_of(spec, device, is_padding=padding), impl)
    assert (routing.topk_ids[padding] == -1).all()
    assert (routing.topk_weights[padding] == 0).all()
    assert torch.equal(routing.topk_ids[~padding], whole.topk_ids[~padding])
    assert torch.equal(routing.topk_weights[~padding], whole.topk_weights[~padding])


def test_each_row_alone_gives_the_same_bits(impl, device):
    spec = dataclasses.replace(SPECS["deepseek_v3"], per_expert_scale=True)
    logits = make_logits("quantised", 4, 32, device=device)
    inputs = inputs_of(spec, device, per_expert_scale=torch.linspace(0.5, 2, 32, device=device))
    whole = routed(logits, spec, inputs, impl)
    for row in range(4):
        alone = turnout.route(logits[row : row + 1], spec, CONTRACT, inputs, impl=impl)
        assert torch.equal(alone.topk_ids[0], whole.topk_ids[row])
        assert torch.equal(alone.topk_weights[0], whole.topk_weights[row])
