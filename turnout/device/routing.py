"""The routing of a tile of rows: what every kernel that routes does, whatever it does besides.

What a `Recipe` does not ask for, and what tensors that are None would do, is not compiled.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from turnout.device import REPLICA_HASH
from turnout.device.keys import NAN, TAKEN, column_of, key_value, ordered_key, with_column, without_column
from turnout.device.rounding import narrowed, widened
from turnout.device.scores import capped, row_max, scores, softmax_total, without_nan
from turnout.device.selection import best_groups_alone, given_experts, largest_keys
from turnout.device.weights import scaled, selected_scores, softmax_shares

_HASH = tl.constexpr(REPLICA_HASH)


class Recipe(NamedTuple):
    """What a kernel is specialised on: of the spec, under its names there; of the contract; sizes of tensors."""

    num_experts: int
    top_k: int
    logit_scale: float
    logit_softcap: float | None
    scoring_func: str
    rounds_scores: bool  # to the dtype of the logits
    ranks_scores: bool
    num_expert_group: int
    topk_group: int
    group_score: str
    fills_with_zero: bool
    weighs_by_shares: bool
    selected_score: str
    shares_among_selected: bool
    renormalize: bool
    renormalize_eps: float
    renormalize_min: float
    routed_scaling_factor: float
    divide_by_top_k: bool
    rounds_weights: bool  # to the dtype of the logits
    sentinel: int
    num_ids: int  # ids that expert_map gives are below it
    num_token_ids: int  # rows of the table of given ids; the size of a tensor that is None is 0
    num_replicas: int
    num_physical_experts: int


@triton.jit
def route_rows(
    logits_ptr,  # [T, E], rows row_stride apart
    scale_ptr,  # [E] or None, as every tensor of RoutingTensors
    is_padding_ptr,  # [T]
    num_valid_ptr,  # [1]
    expert_map_ptr,  # [E]
    bias_ptr,  # [E]
    input_ids_ptr,  # [T]
    given_ids_ptr,  # [num_token_ids, K], or [T, K] without input_ids
    physical_map_ptr,  # [E, num_replicas]
    replica_count_ptr,  # [E]
    record_load_ptr,  # [1]
    num_counted_ptr,  # [1]
    load_ptr,  # [num_physical_experts]
    replay_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K]
    rows,  # [BLOCK_T] int64
    num_tokens,
    row_stride,
    RECIPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Route BLOCK_T rows, held whole, and store their weights and ids."""
    columns = tl.arange(0, BLOCK_E)[None, :]
    is_row = rows < num_tokens
    is_expert = columns < RECIPE.num_experts
    # Lanes take columns one by one, not in runs: the tile then has the layout of the results, and nothing is
    # exchanged through shared memory (fewer instructions a row by 39% at E=128, K=8).
    logit_ptrs = tl.max_contiguous(logits_ptr + rows[:, None] * row_stride + columns, [1, 1])
    logits = widened(tl.load(logit_ptrs, mask=is_row[:, None] & is_expert, other=0.0))
    values = capped(without_nan(logits), RECIPE)
    LOGITS: tl.constexpr = logits_ptr.dtype.element_ty
    SCORES: tl.constexpr = LOGITS if RECIPE.rounds_scores else tl.float32
    IS_GROUPED: tl.constexpr = RECIPE.topk_group < RECIPE.num_expert_group
    best, total = 0.0, 1.0  # of the softmax, where scores are probabilities
    if RECIPE.scoring_func == "softmax" and not RECIPE.weighs_by_shares:
        best = row_max(values, is_expert)
        total = softmax_total(values, best, is_expert, RECIPE.top_k, BLOCK_T, BLOCK_E)

    if given_ids_ptr is None:
        # A 16-bit logit and its column fit one key, which then is unique in its row.
        UNIQUE: tl.constexpr = LOGITS.primitive_bitwidth == 16 and not RECIPE.ranks_scores
        keys = ordered_key(logits)
        if RECIPE.ranks_scores:
            ranked = with_bias(scores(values, best, total, RECIPE, SCORES), bias_ptr, columns, is_expert)
            keys = tl.where(keys == NAN, NAN, ordered_key(ranked))
        if IS_GROUPED:
            keys = best_groups_alone(keys, columns, RECIPE, BLOCK_E)
        if UNIQUE:
            keys = with_column(keys, columns)
        keys = tl.where(is_expert, keys, TAKEN)
        topk_keys, topk_ids, first = largest_keys(keys, columns, UNIQUE, RECIPE.top_k, BLOCK_T, BLOCK_E, BLOCK_K)
        if UNIQUE:
            topk_ids = column_of(topk_keys)
            topk_keys = without_column(topk_keys)
            first = without_column(first)
    slots = tl.arange(0, BLOCK_K)[None, :]
    is_slot = slots < RECIPE.top_k
    carries_work = is_row[:, None] & is_slot
    is_weighed = is_slot
    if given_ids_ptr is not None:
        topk_ids, carries_work = given_experts(given_ids_ptr, input_ids_ptr, rows, is_row, slots, RECIPE)
        is_weighed = carries_work

    if given_ids_ptr is None and not (RECIPE.ranks_scores or IS_GROUPED):  # the keys are those of the logits
        selected = capped(key_value(topk_keys), RECIPE)
        best_of_shares = capped(key_value(first), RECIPE)
    else:
        selected_ptrs = logits_ptr + rows[:, None] * row_stride + topk_ids
        selected = widened(tl.load(selected_ptrs, mask=is_row[:, None] & is_slot, other=0.0))
        selected = capped(without_nan(selected), RECIPE)
        if given_ids_ptr is not None:
            selected = tl.where(is_weighed, selected, float("-inf"))
        best_of_shares = row_max(selected, is_slot) if RECIPE.shares_among_selected else row_max(values, is_expert)
    if RECIPE.weighs_by_shares:
        weights = softmax_shares(
            selected, values, best_of_shares, is_slot, is_expert, RECIPE, BLOCK_T, BLOCK_E, BLOCK_K
        )  # fmt: skip
    else:
        weights = selected_scores(selected, best, total, is_weighed, RECIPE, SCORES, BLOCK_T, BLOCK_K)
    weights = scaled(weights, scale_ptr, topk_ids, is_slot, RECIPE, LOGITS)
    write_routing(
        weights, topk_ids, carries_work, is_padding_ptr, num_valid_ptr, expert_map_ptr, given_ids_ptr,
        physical_map_ptr, replica_count_ptr, record_load_ptr, num_counted_ptr, load_ptr, replay_ptr, weights_ptr,
        ids_ptr, rows, is_row, slots, is_slot, RECIPE,
    )  # fmt: skip


@triton.jit
def write_routing(
    weights,
    topk_ids,  # logical
    carries_work,
    is_padding_ptr,
    num_valid_ptr,
    expert_map_ptr,
    given_ids_ptr,
    physical_map_ptr,
    replica_count_ptr,
    record_load_ptr,
    num_counted_ptr,
    load_ptr,
    replay_ptr,
    weights_ptr,
    ids_ptr,
    rows,
    is_row,
    slots,
    is_slot,
    RECIPE: tl.constexpr,
):
    """Map ids as the consumer counts them, mark slots that carry no work, count the load, and store."""
    positions = rows[:, None] * RECIPE.top_k + slots
    is_written = is_row[:, None] & is_slot
    if is_padding_ptr is not None:
        carries_work = carries_work & (tl.load(is_padding_ptr + rows, mask=is_row, other=1) == 0)[:, None]
    if num_valid_ptr is not None:
        carries_work = carries_work & (rows < tl.load(num_valid_ptr))[:, None]
    if replay_ptr is not None:
        tl.store(replay_ptr + positions, tl.where(carries_work, topk_ids, -1).to(tl.int16), mask=is_written)
    if expert_map_ptr is not None:
        topk_ids = tl.load(expert_map_ptr + topk_ids, mask=is_slot, other=-1)
        carries_work = carries_work & (topk_ids >= 0) & (topk_ids < RECIPE.num_ids)
    if physical_map_ptr is not None:
        topk_ids = physical_ids(topk_ids, physical_map_ptr, replica_count_ptr, rows, is_slot, RECIPE)
        carries_work = carries_work & (topk_ids >= 0)
    if load_ptr is not None:
        count_load(load_ptr, record_load_ptr, num_counted_ptr, topk_ids, carries_work, rows, RECIPE)
    topk_ids = topk_ids.to(ids_ptr.dtype.element_ty)  # which holds the sentinel
    MAY_IDLE: tl.constexpr = is_padding_ptr is not None or num_valid_ptr is not None or given_ids_ptr is not None
    if MAY_IDLE or expert_map_ptr is not None or physical_map_ptr is not None:
        weights = tl.where(carries_work, weights, 0.0)
        topk_ids = tl.where(carries_work, topk_ids, RECIPE.sentinel)
    WEIGHTS: tl.constexpr = weights_ptr.dtype.element_ty
    tl.store(weights_ptr + positions, narrowed(weights, WEIGHTS), mask=is_written)
    tl.store(ids_ptr + positions, topk_ids, mask=is_written)


@triton.jit
def with_bias(values, bias_ptr, columns, is_expert):
    """Values [BLOCK_T, BLOCK_E] plus those of a vector [E], if there is one."""
    if bias_ptr is not None:
        # For each row and one by one, as the logits are: the same layout then.
        bias_ptrs = tl.max_contiguous(tl.broadcast_to(bias_ptr + columns, values.shape), [1, 1])
        values = values + widened(tl.load(bias_ptrs, mask=is_expert, other=0.0))
    return values


@triton.jit
def physical_ids(ids, physical_map_ptr, replica_count_ptr, rows, is_slot, RECIPE: tl.constexpr):
    """The replica of each logical expert that serves a row: the same for all its slots, spread by a hash of the row."""
    hashed = (rows * _HASH).to(tl.uint32)[:, None]
    num_replicas = tl.maximum(tl.load(replica_count_ptr + ids, mask=is_slot, other=1), 1)
    replicas = hashed % num_replicas.to(tl.uint32)
    return tl.load(physical_map_ptr + ids.to(tl.int64) * RECIPE.num_replicas + replicas, mask=is_slot, other=-1)


@triton.jit
def count_load(load_ptr, record_load_ptr, num_counted_ptr, ids, carries_work, rows, RECIPE: tl.constexpr):
    """Add to each physical expert's load how many slots chose it."""
    is_counted = carries_work & (ids < RECIPE.num_physical_experts)
    if num_counted_ptr is not None:
        is_counted = is_counted & (rows < tl.load(num_counted_ptr))[:, None]
    if record_load_ptr is not None:
        is_counted = is_counted & (tl.load(record_load_ptr) != 0)
    tl.atomic_add(load_ptr + ids, 1, mask=is_counted, sem="relaxed")
