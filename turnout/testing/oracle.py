"""An oracle of routing in float64 that shares no code with any implementation.

An implementation computes scores in float32, and libraries differ in the last bits. So the oracle gives bounds: of what
is ranked, and of the weights. Where bounds meet nothing in between is decided by them, and where no score is involved
they leave one answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from turnout.spec import FLOAT32_MAX, RouterSpec
from turnout.types import RoutingInputs

# Of a float32 weight that is a share of a softmax, times the scales: three roundings and the error of one exp.
WEIGHTS_TOLERANCE = 2e-7
# Of a score's value: two units of the exp or log in it and the rounding after it (test_score_bits.py holds kernels to
# that); of tanh, of the cap.
SCORE_TOLERANCE = 3e-7
ROUNDING = 2.0**-24  # of a float32 value
SMALLEST_STEP = 2.0**-149  # between float32 values
# What counts as 0 where exp gives up, from -87 down: 1.6e-38, for a square root 1.3e-19.
SMALLEST_EXP = 2e-38
NO_EXPERT = -1  # the logical id of a slot that has none

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Bounds(NamedTuple):
    """Between what a float32 computation may lie."""

    low: Floats
    high: Floats


class Ranked(NamedTuple):
    """What a selection ranks, [T, E] or of some experts: its value, and the bounds of what is computed for it."""

    exact: Floats  # experts of equal value are equal in any implementation
    low: Floats
    high: Floats

    def at(self, ids: Ints) -> Ranked:
        """Those of the experts [T, K]."""
        return Ranked(*(np.take_along_axis(values, ids, axis=-1) for values in self))

    def rows(self, mask: Bools) -> Ranked:
        """Those of the rows that a mask [T] marks."""
        return Ranked(*(values[mask] for values in self))


_EXTREMES = np.errstate(over="ignore", invalid="ignore")  # infinities are subtracted on purpose


@_EXTREMES
def oracle(router_logits: torch.Tensor, spec: RouterSpec, inputs: RoutingInputs | None = None) -> tuple[Floats, Ints]:
    """Weights [T, K] in float64, not rounded, and logical ids [T, K]; padding and maps are not considered.

    A given id that is no expert is -1, with any weight.
    """
    inputs = RoutingInputs() if inputs is None else inputs
    ids = given_ids(spec, inputs)
    if ids is None:
        ids = _selected(ranked(router_logits, spec, inputs), spec)
    low, high = weight_bounds(router_logits, spec, inputs, ids)
    return (low + high) / 2, ids


def given_ids(spec: RouterSpec, inputs: RoutingInputs) -> Ints | None:
    """The ids [T, K] that the caller gives in place of a selection, -1 for what is no expert; None: none are given."""
    if inputs.forced_ids is not None:
        ids = _int64(inputs.forced_ids)
    elif inputs.tid2eid is not None and inputs.input_ids is not None:
        table, tokens = _int64(inputs.tid2eid), _int64(inputs.input_ids)
        ids = np.full((len(tokens), spec.top_k), -1, dtype=np.int64)
        known = (tokens >= 0) & (tokens < len(table))
        ids[known] = table[tokens[known]]
    else:
        return None
    return np.where((ids >= 0) & (ids < spec.num_experts), ids, NO_EXPERT)


@_EXTREMES
def ranked(router_logits: torch.Tensor, spec: RouterSpec, inputs: RoutingInputs) -> Ranked:
    """What the selection ranks: the logit, exactly, or score plus bias."""
    logits = _float64(router_logits)
    if not spec.ranks_scores:
        return Ranked(logits, logits, logits)
    exact, low, high = _scores(logits, spec, router_logits.dtype)
    bias = np.zeros(spec.num_experts)
    if inputs.e_score_correction_bias is not None:
        bias = _float64(inputs.e_score_correction_bias)
    sides = exact + bias, rounded(low + bias, torch.float32), rounded(high + bias, torch.float32)
    return Ranked(*(np.where(np.isnan(logits), np.nan, side) for side in sides))


@_EXTREMES
def may_be_selected(ids: Ints, values: Ranked, spec: RouterSpec) -> Bools:
    """In which rows [T] the ids are those of the K highest values, for some values within the bounds.

    Each expert chosen ranks above all that were not, and, where the spec sorts, above those after it; inside of the
    groups that are kept, of which again each ranks above those that are not.
    """
    possible = np.zeros(len(ids), dtype=np.bool_)
    for rows, inside in _inside_groups(values, spec):
        open_rows = rows & ~possible
        possible[open_rows] = _are_highest(ids[open_rows], inside.rows(open_rows), spec.sorted)
    return possible


@_EXTREMES
def weight_bounds(router_logits: torch.Tensor, spec: RouterSpec, inputs: RoutingInputs, ids: Ints) -> Bounds:
    """Between what the float32 weights [T, K] of these experts lie, before they are rounded to another dtype."""
    is_none, ids = ids == NO_EXPERT, np.maximum(ids, 0)
    factor = scale_of(ids, spec, inputs)
    if spec.weighs_by_shares:
        share, tolerance = _shares(_float64(router_logits), spec, ids, is_none)
        return Bounds(share * factor - np.abs(factor) * tolerance, share * factor + np.abs(factor) * tolerance)
    low, high = (np.where(is_none, 0.0, side) for side in _selected_scores(router_logits, spec, ids))
    if spec.renormalize:
        low, high = _normalised(low, high, spec)
    parts = spec.top_k if spec.divide_by_top_k else 1  # the last step: what overflowed before it stays infinite
    ends = np.sort(np.stack([low * factor * parts, high * factor * parts]), axis=0)
    slack = 4 * (ROUNDING * np.abs(ends) + SMALLEST_STEP)  # two factors, the division by K, and one to spare
    return Bounds(
        rounded(ends[0] - slack[0], torch.float32) / parts, rounded(ends[1] + slack[1], torch.float32) / parts
    )


def scale_of(ids: Ints, spec: RouterSpec, inputs: RoutingInputs) -> Floats:
    """The factor [T, K] of each weight."""
    factor = np.full(ids.shape, spec.routed_scaling_factor / (spec.top_k if spec.divide_by_top_k else 1))
    return factor if inputs.per_expert_scale is None else factor * _float64(inputs.per_expert_scale)[ids]


def rounded(values: Floats, dtype: torch.dtype) -> Floats:
    """Values as a dtype holds them."""
    return _float64(torch.from_numpy(values).to(dtype))


def _capped(logits: Floats, spec: RouterSpec) -> tuple[Floats, float]:
    """The values that scores are taken of, NaN as -inf, and how far a computation may be off."""
    values = np.where(np.isnan(logits), -np.inf, logits).astype(np.float32)
    values = values * np.float32(spec.logit_scale)  # one rounding, the same everywhere
    if spec.logit_softcap is None:
        return values.astype(np.float64), 0.0
    cap = np.float32(spec.logit_softcap)
    return np.tanh((values / cap).astype(np.float64)) * cap, float(cap) * (SCORE_TOLERANCE + ROUNDING)


def _scores(logits: Floats, spec: RouterSpec, dtype: torch.dtype) -> Ranked:
    """The scores of all experts, finite: a logit or a score of infinity counts as the largest number of its dtype."""
    values, error = _capped(logits, spec)
    relative = np.full(values.shape, SCORE_TOLERANCE + error)
    smallest = SMALLEST_EXP
    if spec.scoring_func == "softmax":
        exact, relative = _softmax(values, error, spec.top_k)
    elif spec.scoring_func == "sigmoid":
        exact = 1 / (1 + np.exp(-values))
    elif spec.scoring_func == "sqrtsoftplus":
        exact, smallest = np.sqrt(np.logaddexp(0, np.minimum(values, FLOAT32_MAX))), SMALLEST_EXP**0.5
    else:
        exact, relative, smallest = values, np.zeros(values.shape), error
    dtype = dtype if spec.score_dtype == "input" else torch.float32
    largest = torch.finfo(dtype).max
    exact = np.clip(exact, -largest, largest)
    slack = relative * np.abs(exact) + smallest
    low, high = (rounded(np.clip(end, -largest, largest), torch.float32) for end in (exact - slack, exact + slack))
    return Ranked(exact, rounded(low, dtype), rounded(high, dtype))


def _softmax(values: Floats, error: float, top_k: int) -> tuple[Floats, Floats]:
    """The softmax of each row, and its relative error: that of each exponent, of exp, and of the sum.

    Entries of +inf share all of it; nothing but -inf gives K equal shares.
    """
    best = values.max(axis=-1, keepdims=True)
    depth = np.where(values == best, 0.0, values - best)
    mass = np.exp(depth)
    relative = SCORE_TOLERANCE + ROUNDING * np.minimum(np.abs(depth), 100) + 2 * error
    total = mass.sum(axis=-1, keepdims=True)
    of_total = (mass * relative).sum(axis=-1, keepdims=True) / total + 12 * ROUNDING
    return mass / np.where(best == -np.inf, top_k, total), relative + of_total


def _shares(logits: Floats, spec: RouterSpec, ids: Ints, is_none: Bools) -> tuple[Floats, Floats]:
    """Shares [T, K] of the softmax among all, or among the selected, and how far they may be off."""
    values, error = _capped(logits, spec)
    chosen = np.where(is_none, -np.inf, np.take_along_axis(values, ids, axis=-1))
    if spec.renormalize or spec.selected_score == "softmax":
        share, _ = _softmax(chosen, error, spec.top_k)
    else:
        share = np.take_along_axis(_softmax(values, error, spec.top_k)[0], ids, axis=-1)
    return share, WEIGHTS_TOLERANCE + 4 * error * share


def _selected_scores(router_logits: torch.Tensor, spec: RouterSpec, ids: Ints) -> Bounds:
    """The scores of the selected experts, or the function that the spec applies to them."""
    logits = _float64(router_logits)
    if spec.selected_score == "sigmoid":
        values, error = _capped(logits, spec)
        exact = 1 / (1 + np.exp(-np.take_along_axis(values, ids, axis=-1)))
        slack = (SCORE_TOLERANCE + error) * exact + SMALLEST_EXP
        return Bounds(np.maximum(exact - slack, 0), exact + slack)
    _, low, high = _scores(logits, spec, router_logits.dtype).at(ids)
    return Bounds(low if spec.scoring_func == "none" else np.maximum(low, 0), high)


def _normalised(low: Floats, high: Floats, spec: RouterSpec) -> Bounds:
    """Weights divided by their sum, itself between bounds; all K alike where nothing has any weight."""
    slack = (spec.top_k.bit_length() + 3) * ROUNDING  # the sum by halves, epsilon and the division
    totals = [
        np.maximum(side.sum(axis=-1, keepdims=True) + spec.renormalize_eps, spec.renormalize_min)
        for side in (low, high)
    ]
    alike = 1 / spec.top_k
    least = np.where(totals[1] > 0, low * (1 - slack) / np.where(totals[1] > 0, totals[1], 1), alike)
    most = np.where(totals[0] > 0, high * (1 + slack) / np.where(totals[0] > 0, totals[0], 1), 1.0)
    may_be_alike = totals[0] == 0
    return Bounds(np.where(may_be_alike, np.minimum(least, alike), least), np.where(may_be_alike, 1.0, most))


def _selected(values: Ranked, spec: RouterSpec) -> Ints:
    """The K highest of each row, a stable sort that puts NaN last, inside of the best groups."""
    exact = values.exact
    if spec.topk_group < spec.num_expert_group:
        group_scores = _of_groups(values, spec).exact
        kept = _descending(group_scores)[:, : spec.topk_group]
        is_kept = np.zeros(group_scores.shape, dtype=np.bool_)
        np.put_along_axis(is_kept, kept, True, axis=-1)
        exact = np.where(is_kept.repeat(spec.num_experts // spec.num_expert_group, axis=-1), exact, _fill(spec))
    return _descending(exact)[:, : spec.top_k]


def _descending(values: Floats) -> Ints:
    is_nan = np.isnan(values)
    return np.lexsort((-np.where(is_nan, 0.0, values), is_nan), axis=-1)


def _inside_groups(values: Ranked, spec: RouterSpec) -> Iterator[tuple[Bools, Ranked]]:
    """For each choice of groups: in which rows it may be made, and what is then ranked."""
    if spec.topk_group == spec.num_expert_group:
        yield np.ones(len(values.exact), dtype=np.bool_), values
        return
    group_scores, size = _of_groups(values, spec), spec.num_experts // spec.num_expert_group
    for kept in itertools.combinations(range(spec.num_expert_group), spec.topk_group):
        rows = _are_highest(np.tile(np.array(kept), (len(values.exact), 1)), group_scores, is_sorted=False)
        if rows.any():
            is_kept = np.isin(np.arange(spec.num_experts) // size, kept)
            yield rows, Ranked(*(np.where(is_kept, side, _fill(spec)) for side in values))


def _of_groups(values: Ranked, spec: RouterSpec) -> Ranked:
    """The score of each group: its best, or the sum of its two best; NaN where it has not as many."""
    count = 1 if spec.group_score == "max" else 2
    shape = (-1, spec.num_expert_group, spec.num_experts // spec.num_expert_group)
    best = [-np.sort(-side.reshape(shape), axis=-1)[:, :, :count].sum(axis=-1) for side in values]
    return Ranked(best[0], rounded(best[1], torch.float32), rounded(best[2], torch.float32))


def _fill(spec: RouterSpec) -> float:
    """The value of experts outside of the groups; 0 lies below scores without a bias, as -inf does."""
    return 0.0 if spec.group_fill == "zero" and (spec.ranks_scores or spec.scoring_func == "none") else -np.inf


def _are_highest(ids: Ints, values: Ranked, is_sorted: bool) -> Bools:
    chosen = values.at(ids)
    others = _ranks_above(chosen, ids, values, np.arange(values.exact.shape[-1])[None])  # [T, K, E]
    is_chosen = np.zeros(values.exact.shape, dtype=np.bool_)
    np.put_along_axis(is_chosen, ids, True, axis=-1)
    highest = np.asarray((others | is_chosen[:, None]).all(axis=(1, 2)), dtype=np.bool_)
    if is_sorted:
        after = np.triu(np.ones((ids.shape[1], ids.shape[1]), dtype=np.bool_), k=1)
        highest &= (_ranks_above(chosen, ids, chosen, ids) | ~after).all(axis=(1, 2))
    return highest


def _ranks_above(one: Ranked, ids: Ints, other: Ranked, other_ids: Ints) -> Bools:
    """Whether each of ``one`` [T, A] may rank above each of ``other`` [T, B]: [T, A, B]."""
    one = Ranked(*(side[:, :, None] for side in one))
    other = Ranked(*(side[:, None, :] for side in other))
    is_first = ids[:, :, None] < other_ids[:, None, :]
    is_nan, other_is_nan = np.isnan(one.exact), np.isnan(other.exact)
    # Bounds that touch leave one way: both values are that one.
    is_tied = (one.exact == other.exact) | (is_nan & other_is_nan) | (one.high == other.low)
    return np.asarray(np.where(is_tied, is_first, (one.high > other.low) | (~is_nan & other_is_nan)), dtype=np.bool_)


def _float64(tensor: torch.Tensor) -> Floats:
    return np.asarray(tensor.detach().cpu().double().numpy(), dtype=np.float64)


def _int64(tensor: torch.Tensor) -> Ints:
    return np.asarray(tensor.cpu().numpy(), dtype=np.int64)
