"""The numba kernel behind ``cpu.py`` for every router family, a row at a time. Importing this module imports numba.

Slower than `_cpu_kernel.py`, which routes the plain softmax families; the semantics are those of ``reference.py``,
scores bit for bit. What the spec says comes in one record, what the call brings in another.
"""

import math

import numpy as np
from numba import carray, njit

from turnout.device import REPLICA_HASH
from turnout.device.polynomials import (
    EXP_COEFFICIENTS,
    EXP_MAX,
    EXP_MIN,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    LOG_COEFFICIENTS,
)
from turnout.routing._cpu_kernel import (
    load,
    pointer,
    round_to,
    select,
    softmax_value,
    store,
    tree_sum,
    unnormalized_softmax,
    value_of,
)

SOFTMAX, SIGMOID, SQRTSOFTPLUS, NO_SCORE = 0, 1, 2, 3  # family.scoring
INT16, INT32, INT64, BOOL = 0, 1, 2, 3  # codes of integer dtypes

FAMILY = np.dtype(
    [(name, np.int64) for name in (
        "num_experts", "top_k", "num_groups", "topk_group", "scoring", "score_code", "rounding_code", "ranks_scores",
        "top2_sum", "weighs_by_shares", "sigmoid_of_selected", "among_selected", "renormalize", "divide_by_top_k",
    )] + [(name, np.float32) for name in (
        "logit_scale", "softcap", "largest_score", "group_fill", "renormalize_eps", "renormalize_min",
        "scaling_factor",
    )]
)  # fmt: skip
# Addresses, 0 for what is absent, each followed by the code of its dtype where that is not fixed. An empty table of
# given ids may lie at 0, too: num_given is -1 where there is none.
CALL = np.dtype(
    [(name, np.int64) for name in (
        "logits", "logits_code", "row_stride", "weights", "weights_code", "ids", "ids_code", "sentinel", "num_ids",
        "scale", "scale_code", "is_padding", "num_valid", "expert_map", "bias", "bias_code",
        "input_ids", "input_ids_code", "given_ids", "given_ids_code", "num_given",
        "physical_map", "num_replicas_max", "num_replicas",
        "record_load", "num_counted", "load", "num_physical", "replay_ids",
    )]
)  # fmt: skip

_ZERO, _HALF, _ONE, _TWO = np.float32(0.0), np.float32(0.5), np.float32(1.0), np.float32(2.0)
_INF, _MAX = np.float32(np.inf), np.finfo(np.float32).max
_SQRT2 = np.float32(math.sqrt(2))
_EXP_MIN, _EXP_MAX, _LOG2_E = np.float32(EXP_MIN), np.float32(EXP_MAX), np.float32(LOG2_E)
_LN2_HIGH, _LN2_LOW = np.float32(LN2_HIGH), np.float32(LN2_LOW)
_EXP = tuple(np.float32(coefficient) for coefficient in EXP_COEFFICIENTS)
_LOG = tuple(np.float32(coefficient) for coefficient in LOG_COEFFICIENTS)


@njit(nogil=True, cache=True)
def read_float(address, code, index):
    """Element ``index`` of the floats at an address, as float32."""
    floats = carray(pointer(address), index + 1, np.float32)
    return load(floats, carray(pointer(address), index + 1, np.uint16), code, index)


@njit(nogil=True, cache=True)
def write_float(address, code, index, value):
    """Write a float32 value to element ``index`` of the floats at an address, rounded once."""
    floats = carray(pointer(address), index + 1, np.float32)
    store(floats, carray(pointer(address), index + 1, np.uint16), code, index, value)


@njit(nogil=True, cache=True)
def read_int(address, code, index):
    """Element ``index`` of the integers at an address, as int64."""
    if code == INT16:
        return np.int64(carray(pointer(address), index + 1, np.int16)[index])
    if code == INT32:
        return np.int64(carray(pointer(address), index + 1, np.int32)[index])
    if code == BOOL:
        return np.int64(carray(pointer(address), index + 1, np.uint8)[index])
    return carray(pointer(address), index + 1, np.int64)[index]


@njit(nogil=True, cache=True)
def write_int(address, code, index, value):
    """Write element ``index`` of the integers at an address."""
    if code == INT16:
        carray(pointer(address), index + 1, np.int16)[index] = value
    elif code == INT32:
        carray(pointer(address), index + 1, np.int32)[index] = value
    else:
        carray(pointer(address), index + 1, np.int64)[index] = value


@njit(nogil=True, cache=True)
def exp(x):
    """As ``scores.exp``, and so with the functions that follow.

    None branches, nor raises where it divides by zero: loops over them become vector instructions.
    """
    clamped = min(max(x, _EXP_MIN), _EXP_MAX)
    n = np.floor(clamped * _LOG2_E + _HALF)
    r = clamped - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    y = _EXP[0]
    for i in range(1, len(_EXP)):
        y = y * r + _EXP[i]
    y = y * (r * r) + r + _ONE
    y = y * value_of((np.int64(n) + 127) << 23)
    y = _ZERO if x < _EXP_MIN else y
    return _INF if x > _EXP_MAX else y


@njit(nogil=True, cache=True, error_model="numpy")
def log1p(e):
    u = _ONE + e
    is_large = u > _SQRT2
    r = (u * _HALF if is_large else u) - _ONE
    y = _LOG[0]
    for i in range(1, len(_LOG)):
        y = y * r + _LOG[i]
    z = r * r
    y = y * r * z
    if is_large:
        y = y + _LN2_LOW
    y = y - z * _HALF
    y = r + y
    if is_large:
        y = y + _LN2_HIGH
    lost = u - _ONE
    return e if lost == _ZERO else y * (e / lost)


@njit(nogil=True, cache=True, error_model="numpy")
def sigmoid(x):
    return _ONE / (_ONE + exp(-x))


@njit(nogil=True, cache=True, error_model="numpy")
def sqrtsoftplus(x):
    softplus = min(max(x, _ZERO), _MAX) + log1p(exp(-abs(x)))
    return np.float32(math.sqrt(np.float64(softplus)))


@njit(nogil=True, cache=True, error_model="numpy")
def tanh(x):
    e = exp(-_TWO * abs(x))
    y = (_ONE - e) / (_ONE + e)
    return -y if x < _ZERO else y


@njit(nogil=True, cache=True)
def capped(logit, family):
    value = softmax_value(logit)
    if family.logit_scale != _ONE:
        value = value * family.logit_scale
    if family.softcap != _ZERO:
        value = tanh(value / family.softcap) * family.softcap
    return value


@njit(nogil=True, cache=True)
def largest(values):
    """The largest of values without NaN."""
    best = values[0]
    for value in values[1:]:
        best = max(best, value)
    return best


@njit(nogil=True, cache=True)
def softmax_mass(value, best):
    return _ONE if value == best else exp(value - best)


@njit(nogil=True, cache=True, error_model="numpy")
def score(value, best, total, family):
    """The score of one value; ``best`` and ``total`` are those of the row's softmax."""
    if family.scoring == SOFTMAX:
        value = softmax_mass(value, best) / total
    elif family.scoring == SIGMOID:
        value = sigmoid(value)
    elif family.scoring == SQRTSOFTPLUS:
        value = sqrtsoftplus(value)
    return limited(value, family)


@njit(nogil=True, cache=True)
def limited(value, family):
    """A score that is finite, and rounded where the model rounds it."""
    return round_to(min(max(value, -family.largest_score), family.largest_score), family.score_code)


@njit(nogil=True, cache=True)
def softmax_of_row(values, family, scratch):
    """What `score` needs of the whole row: its largest value, and the sum of the masses."""
    if family.scoring != SOFTMAX:
        return _ZERO, _ONE
    best = largest(values)
    if best == -_INF:
        return best, np.float32(family.top_k)
    for expert in range(family.num_experts):
        scratch[expert] = softmax_mass(values[expert], best)
    return best, tree_sum(scratch, family.num_experts)


@njit(nogil=True, cache=True, error_model="numpy")
def scores_of_row(values, best, total, family, scores):
    """`score` of every expert; a loop for each function, so that none has to ask inside which it is."""
    num_experts = family.num_experts
    if family.scoring == SOFTMAX:
        for expert in range(num_experts):
            scores[expert] = softmax_mass(values[expert], best) / total
    elif family.scoring == SIGMOID:
        for expert in range(num_experts):
            scores[expert] = sigmoid(values[expert])
    elif family.scoring == SQRTSOFTPLUS:
        for expert in range(num_experts):
            scores[expert] = sqrtsoftplus(values[expert])
    else:
        scores[:] = values
    for expert in range(num_experts):
        scores[expert] = limited(scores[expert], family)


@njit(nogil=True, cache=True)
def rank_scores(ranked, values, best, total, family, call, scratch):
    """Replace the logits in ``ranked`` by scores plus bias; NaN stays."""
    scores_of_row(values, best, total, family, scratch)
    for expert in range(family.num_experts):
        if ranked[expert] == ranked[expert]:
            ranked[expert] = scratch[expert]
            if call.bias:
                ranked[expert] += read_float(call.bias, call.bias_code, expert)


@njit(nogil=True, cache=True)
def keep_best_groups(ranked, halves, family, keys, ids, scratch):
    """Fill ``ranked`` outside the best groups."""
    size = family.num_experts // family.num_groups
    for group in range(family.num_groups):
        start = group * size
        select(ranked, halves, 0, start, size, min(2, size), keys, ids)
        scratch[group] = ranked[start + ids[0]]
        if family.top2_sum and size > 1:
            scratch[group] += ranked[start + ids[1]]
    select(scratch, halves, 0, 0, family.num_groups, family.topk_group, keys, ids)
    for group in range(family.num_groups):
        scratch[group] = _ZERO
    for k in range(family.topk_group):
        scratch[ids[k]] = _ONE
    for expert in range(family.num_experts):
        if scratch[expert // size] == _ZERO:
            ranked[expert] = family.group_fill


@njit(nogil=True, cache=True)
def take_given_ids(row, family, call, ids):
    """The ids that the caller gave; -1 for what is no expert."""
    source = row
    if call.input_ids:
        source = read_int(call.input_ids, call.input_ids_code, row)
    for k in range(family.top_k):
        ids[k] = -1
        if 0 <= source < call.num_given:
            expert = read_int(call.given_ids, call.given_ids_code, source * family.top_k + k)
            if 0 <= expert < family.num_experts:
                ids[k] = expert


@njit(nogil=True, cache=True)
def share(values, ids, family, weights, scratch):
    """The softmax of the selected values among themselves, or among all."""
    for k in range(family.top_k):
        weights[k] = values[ids[k]] if ids[k] >= 0 else -_INF
    best = largest(weights[: family.top_k]) if family.among_selected else largest(values)
    for k in range(family.top_k):
        weights[k] = unnormalized_softmax(weights[k], best)
        scratch[k] = weights[k]
    if family.among_selected:
        total = tree_sum(scratch, family.top_k)
    elif best == -_INF:
        total = np.float32(family.top_k)  # nothing but -inf: K equal shares
    else:
        for expert in range(family.num_experts):
            scratch[expert] = unnormalized_softmax(values[expert], best)
        total = tree_sum(scratch, family.num_experts)
    for k in range(family.top_k):
        weights[k] = weights[k] / total


@njit(nogil=True, cache=True)
def weigh_scores(values, ids, best, total, family, weights, scratch):
    """The scores of the selected experts, renormalised where the spec says so."""
    for k in range(family.top_k):
        weights[k] = _ZERO
        if ids[k] >= 0:
            value = values[ids[k]]
            weights[k] = sigmoid(value) if family.sigmoid_of_selected else score(value, best, total, family)
        scratch[k] = weights[k]
    if family.renormalize:
        norm = max(tree_sum(scratch, family.top_k) + family.renormalize_eps, family.renormalize_min)
        for k in range(family.top_k):
            # Where nothing selected has any weight, all K share equally.
            weights[k] = np.float32(1.0 / family.top_k) if norm == _ZERO else weights[k] / norm


@njit(nogil=True, cache=True)
def apply_factors(ids, family, call, weights):
    for k in range(family.top_k):
        weight = weights[k]
        if call.scale:
            weight = weight * read_float(call.scale, call.scale_code, max(ids[k], 0))
        weight = weight * family.scaling_factor
        if family.divide_by_top_k:
            weight = weight / np.float32(family.top_k)
        weights[k] = round_to(weight, family.rounding_code)


@njit(nogil=True, cache=True)
def mapped(expert, row, call):
    """The consumer's id of a logical one; negative where it has none."""
    if expert < 0:
        return expert
    if call.expert_map:
        local = read_int(call.expert_map, INT32, expert)
        return local if local < call.num_ids else np.int64(-1)
    if call.physical_map:  # the same replica for all slots of a row, spread by a hash of the row
        # No further than the map's row: what lies behind it is not ours to read.
        count = min(max(read_int(call.num_replicas, INT64, expert), 1), call.num_replicas_max)
        replica = ((row * REPLICA_HASH) & 0xFFFFFFFF) % count
        return read_int(call.physical_map, INT64, expert * call.num_replicas_max + replica)
    return expert


@njit(nogil=True, cache=True)
def write_row(row, ids, weights, family, call):
    """Write the slots of a row, keep its logical ids and count its load."""
    counts = call.load and (not call.record_load or read_int(call.record_load, BOOL, 0))
    counts = counts and (not call.num_counted or row < read_int(call.num_counted, INT32, 0))
    for k in range(family.top_k):
        slot = row * family.top_k + k
        if call.replay_ids:
            write_int(call.replay_ids, INT16, slot, ids[k])
        expert = mapped(ids[k], row, call)
        if counts and 0 <= expert < call.num_physical:
            write_int(call.load, INT32, expert, read_int(call.load, INT32, expert) + 1)
        write_int(call.ids, call.ids_code, slot, call.sentinel if expert < 0 else expert)
        write_float(call.weights, call.weights_code, slot, _ZERO if expert < 0 else weights[k])


@njit(nogil=True, cache=True)
def route_rows_of_any_family(families, call_fields, first_row, end_row):
    """Route rows first_row to end_row by the one FAMILY in its array and the fields of a CALL."""
    family, call = families[0], call_fields.view(CALL)[0]
    most = max(family.top_k, family.topk_group, 2)
    keys, ids = np.empty(most, np.int64), np.empty(most, np.int64)
    weights = np.empty(family.top_k, np.float32)
    ranked, values = np.empty(family.num_experts, np.float32), np.empty(family.num_experts, np.float32)
    scratch = np.empty(family.num_experts, np.float32)
    halves = np.empty(0, np.uint16)  # `select` reads them for other dtypes
    valid = read_int(call.num_valid, INT32, 0) if call.num_valid else end_row

    for row in range(first_row, end_row):
        if row >= valid or (call.is_padding and read_int(call.is_padding, BOOL, row)):
            ids[: family.top_k] = -1
            write_row(row, ids, weights, family, call)
            continue
        for expert in range(family.num_experts):
            ranked[expert] = read_float(call.logits, call.logits_code, row * call.row_stride + expert)
            values[expert] = capped(ranked[expert], family)
        best, total = softmax_of_row(values, family, scratch)
        if call.num_given >= 0:
            take_given_ids(row, family, call, ids)
        else:
            if family.ranks_scores:
                rank_scores(ranked, values, best, total, family, call, scratch)
            if family.topk_group < family.num_groups:
                keep_best_groups(ranked, halves, family, keys, ids, scratch)
            select(ranked, halves, 0, 0, family.num_experts, family.top_k, keys, ids)
        if family.weighs_by_shares:
            share(values, ids, family, weights, scratch)
        else:
            weigh_scores(values, ids, best, total, family, weights, scratch)
        apply_factors(ids, family, call, weights)
        write_row(row, ids, weights, family, call)
