"""The routing of a tile of rows: what every kernel that routes does, whatever it does besides."""

import triton
import triton.language as tl

from turnout.device.keys import TAKEN, column_of, key_value, ordered_key, with_column, without_column
from turnout.device.rounding import narrowed, round_to, widened
from turnout.device.softmax import tree_sum, unnormalized_softmax


@triton.jit
def route_rows(
    logits_ptr,  # [T, E], rows row_stride apart
    scale_ptr,  # [E] or None
    is_padding_ptr,  # [T] or None
    num_valid_ptr,  # [1] or None
    expert_map_ptr,  # [E] or None
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K]
    rows,  # [BLOCK_T] int64
    num_tokens,
    row_stride,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALING_FACTOR: tl.constexpr,
    ROUNDING: tl.constexpr,  # dtype to which the model rounds its weights
    SENTINEL: tl.constexpr,
    NUM_IDS: tl.constexpr,  # ids that the map gives are below it
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Route BLOCK_T rows, held whole, and store their weights and ids.

    K rounds take the largest key and, among equals, the lowest column.
    """
    columns = tl.arange(0, BLOCK_E)[None, :]
    is_row = rows < num_tokens
    is_expert = columns < NUM_EXPERTS
    # Lanes take columns one by one, not in runs: the tile then has the layout of the results, and nothing is
    # exchanged through shared memory (fewer instructions a row by 39% at E=128, K=8).
    logit_ptrs = tl.max_contiguous(logits_ptr + rows[:, None] * row_stride + columns, [1, 1])
    logits = widened(tl.load(logit_ptrs, mask=is_row[:, None] & is_expert, other=0.0))

    # A 16-bit logit and its column fit one key, which then is unique in its row.
    UNIQUE: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth == 16
    keys = ordered_key(logits)
    if not RENORMALIZE:
        values = key_value(keys)
    if UNIQUE:
        keys = with_column(keys, columns)
    keys = tl.where(is_expert, keys, TAKEN)
    slots = tl.arange(0, BLOCK_K)[None, :]
    topk_keys = tl.full([BLOCK_T, BLOCK_K], 0, tl.int32)
    topk_ids = tl.full([BLOCK_T, BLOCK_K], 0, tl.int32)
    for k in tl.static_range(TOP_K):
        top_key = tl.max(keys, axis=1)[:, None]
        topk_keys = tl.where(slots == k, top_key, topk_keys)
        taken = keys == top_key
        if not UNIQUE:
            lowest = tl.min(tl.where(taken, columns, BLOCK_E), axis=1)[:, None]
            topk_ids = tl.where(slots == k, lowest, topk_ids)
            taken = columns == lowest
        if k == 0:
            best = top_key
        keys = tl.where(taken, TAKEN, keys)

    if UNIQUE:
        topk_ids = column_of(topk_keys)
        topk_keys = without_column(topk_keys)
        best = without_column(best)
    best = key_value(best)
    is_slot = slots < TOP_K
    mass = tl.where(is_slot, unnormalized_softmax(key_value(topk_keys), best), 0.0)
    if RENORMALIZE:
        total = tree_sum(mass, BLOCK_T, BLOCK_K)
    else:
        everyone = unnormalized_softmax(values, best)
        total = tree_sum(tl.where(is_expert, everyone, 0.0), BLOCK_T, BLOCK_E)
        total = tl.where(best == float("-inf"), TOP_K, total)  # nothing but -inf: K equal shares
    weights = tl.div_rn(mass, tl.broadcast_to(total, [BLOCK_T, BLOCK_K]))
    if scale_ptr is not None:
        weights = weights * widened(tl.load(scale_ptr + topk_ids, mask=is_slot, other=0.0))
    weights = weights * SCALING_FACTOR
    weights = round_to(weights, ROUNDING)

    is_token = is_row
    if is_padding_ptr is not None:
        is_token = is_token & (tl.load(is_padding_ptr + rows, mask=is_row, other=1) == 0)
    if num_valid_ptr is not None:
        is_token = is_token & (rows < tl.load(num_valid_ptr))
    if is_padding_ptr is not None or num_valid_ptr is not None or expert_map_ptr is not None:
        carries_work = is_token[:, None] & is_slot
        if expert_map_ptr is not None:
            topk_ids = tl.load(expert_map_ptr + topk_ids, mask=is_slot, other=-1)
            carries_work = carries_work & (topk_ids >= 0) & (topk_ids < NUM_IDS)
        weights = tl.where(carries_work, weights, 0.0)
        topk_ids = tl.where(carries_work, topk_ids, SENTINEL)

    positions = rows[:, None] * TOP_K + slots
    is_written = is_row[:, None] & is_slot
    WEIGHTS: tl.constexpr = weights_ptr.dtype.element_ty
    tl.store(weights_ptr + positions, narrowed(weights, WEIGHTS), mask=is_written)
    tl.store(ids_ptr + positions, topk_ids.to(ids_ptr.dtype.element_ty), mask=is_written)
