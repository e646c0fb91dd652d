"""Which experts a tile of rows takes: by their keys, inside of the best groups, or as the caller says."""

import triton
import triton.language as tl

from turnout.device.keys import MINUS_INF, NAN, TAKEN, key_value, ordered_key


@triton.jit
def largest_keys(
    keys,  # [BLOCK_T, BLOCK_E]
    columns,  # [1, BLOCK_E]
    UNIQUE: tl.constexpr,  # whether no key is twice in a row
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The K largest keys of each row, their columns where keys are not unique, and the largest key alone.

    K rounds take the largest key and, among equals, the lowest column.
    """
    slots = tl.arange(0, BLOCK_K)[None, :]
    topk_keys = tl.full([BLOCK_T, BLOCK_K], 0, tl.int32)
    topk_columns = tl.full([BLOCK_T, BLOCK_K], 0, tl.int32)
    for k in tl.static_range(TOP_K):
        top_key = tl.max(keys, axis=1)[:, None]
        topk_keys = tl.where(slots == k, top_key, topk_keys)
        taken = keys == top_key
        if not UNIQUE:
            lowest = tl.min(tl.where(taken, columns, BLOCK_E), axis=1)[:, None]
            topk_columns = tl.where(slots == k, lowest, topk_columns)
            taken = columns == lowest
        if k == 0:
            largest = top_key
        keys = tl.where(taken, TAKEN, keys)
    return topk_keys, topk_columns, largest


@triton.jit
def in_best_groups(
    keys,  # [BLOCK_T, BLOCK_E]
    columns,  # [1, BLOCK_E]
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SUMS_TWO: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Which experts lie in the groups of the highest score, ties to the lowest group."""
    groups = columns // GROUP_SIZE
    group_keys = tl.full(keys.shape, TAKEN, tl.int32)  # of the group of each expert
    for group in tl.static_range(NUM_GROUPS):
        is_inside = groups == group
        members = tl.where(is_inside, keys, TAKEN)
        key = tl.max(members, axis=1)[:, None]
        if SUMS_TWO and GROUP_SIZE > 1:
            lowest = tl.min(tl.where(members == key, columns, BLOCK_E), axis=1)[:, None]
            second = tl.max(tl.where(columns == lowest, TAKEN, members), axis=1)[:, None]
            key = tl.where(second == NAN, NAN, ordered_key(key_value(key) + key_value(second)))
        group_keys = tl.where(is_inside, key, group_keys)
    is_kept = tl.full(keys.shape, 0, tl.int1)
    for _ in tl.static_range(TOPK_GROUP):
        best = tl.max(group_keys, axis=1)[:, None]
        lowest = tl.min(tl.where(group_keys == best, columns, BLOCK_E), axis=1)[:, None]
        is_best = groups == lowest // GROUP_SIZE
        is_kept = is_kept | is_best
        group_keys = tl.where(is_best, TAKEN, group_keys)
    return is_kept


@triton.jit
def best_groups_alone(keys, columns, RECIPE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Keys, and outside of the groups that the selection keeps the key that fills them."""
    is_kept = in_best_groups(
        keys, columns, RECIPE.num_expert_group, RECIPE.num_experts // RECIPE.num_expert_group, RECIPE.topk_group,
        RECIPE.group_score == "top2_sum", BLOCK_E,
    )  # fmt: skip
    if RECIPE.fills_with_zero:
        return tl.where(is_kept, keys, 0)  # the key of 0.0
    else:
        return tl.where(is_kept, keys, MINUS_INF)


@triton.jit
def given_experts(given_ids_ptr, input_ids_ptr, rows, is_row, slots, RECIPE: tl.constexpr):
    """The ids that the caller gave, by token id or by row, 0 for what is no expert; and which slots have one."""
    if input_ids_ptr is not None:
        tokens = tl.load(input_ids_ptr + rows, mask=is_row, other=-1).to(tl.int64)
        is_row = (tokens >= 0) & (tokens < RECIPE.num_token_ids)
        rows = tokens
    is_slot = is_row[:, None] & (slots < RECIPE.top_k)
    ids = tl.load(given_ids_ptr + rows[:, None] * RECIPE.top_k + slots, mask=is_slot, other=-1).to(tl.int64)
    is_expert = (ids >= 0) & (ids < RECIPE.num_experts)
    return tl.where(is_expert, ids, 0).to(tl.int32), is_expert
