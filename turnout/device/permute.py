"""The structures of a permutation, written by one program or by several that share the work.

A tile of slots is sorted by (expert, slot) keys, which are all different: the order is that of a stable sort, whatever
the layout. A slot whose id is no expert sorts behind all others, as expert BLOCK_E. Programs are numbered in int64, so
that products with them are 64 bits wide.
"""

import triton
import triton.language as tl

from turnout.device import SCHEDULE_BLOCK_SIZES

# A key's lowest bits number a slot inside its tile.
MAX_TILE_SLOTS = 1024
_SLOT_BITS = tl.constexpr(10)
_SLOT_MASK = tl.constexpr(MAX_TILE_SLOTS - 1)
BLOCK = tl.constexpr(1024)  # elements that a program fills at once
ROWS = tl.constexpr(8)  # rows of the bitmatrix, and of the counts, that a program takes at once
_SCHEDULES = tl.constexpr(len(SCHEDULE_BLOCK_SIZES))
_SMALLEST = tl.constexpr(SCHEDULE_BLOCK_SIZES[0])  # each further size is twice the one before


@triton.jit
def expert_of(ids, NUM_EXPERTS: tl.constexpr, NO_EXPERT: tl.constexpr):
    """Ids of any dtype as int32; NO_EXPERT for those that are no expert."""
    return tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, NO_EXPERT).to(tl.int32)


@triton.jit
def load_experts(
    ids_ptr, map_ptr, map_size, slots, is_slot, NUM_EXPERTS: tl.constexpr, NO_EXPERT: tl.constexpr
):  # fmt: skip
    """The experts of slots, through a map [map_size] if there is one; NO_EXPERT where there is none, and no slot."""
    ids = tl.load(ids_ptr + slots, mask=is_slot, other=0)
    if map_ptr is not None:
        is_slot = is_slot & (ids >= 0) & (ids < map_size)
        ids = tl.load(map_ptr + ids, mask=is_slot, other=0)
    return tl.where(is_slot, expert_of(ids, NUM_EXPERTS, NO_EXPERT), NO_EXPERT)


@triton.jit
def count_slots(experts, BLOCK_E: tl.constexpr):
    """How many of a tile's slots chose each expert: [BLOCK_E] int32."""
    return tl.histogram(tl.minimum(experts, BLOCK_E - 1), BLOCK_E, mask=experts < BLOCK_E)


@triton.jit
def sort_slots(experts, BLOCK_S: tl.constexpr):
    """The experts of a tile in ascending order, and where in the tile each stood."""
    keys = tl.sort((experts << _SLOT_BITS) | tl.arange(0, BLOCK_S))
    return keys >> _SLOT_BITS, keys & _SLOT_MASK


@triton.jit
def of_expert(values, experts, BLOCK_E: tl.constexpr):
    """``values[experts]``; of a slot without an expert, anything."""
    return tl.gather(values, tl.minimum(experts, BLOCK_E - 1), axis=0)


@triton.jit
def starts_of(counts):
    """Where each expert's share starts: the exclusive sums of counts."""
    return tl.cumsum(counts, axis=0) - counts


@triton.jit
def max_blocks(num_slots, NUM_EXPERTS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Blocks that this many slots fill at most, each block of one expert."""
    return (num_slots + tl.minimum(num_slots, NUM_EXPERTS) * (BLOCK_SIZE - 1)) // BLOCK_SIZE


@triton.jit
def fill(ptr, value, first, end, program, programs):
    """Write a value to elements ``first`` to ``end``, each program its part."""
    for start in range(first + program * BLOCK, end, programs * BLOCK):
        elements = start + tl.arange(0, BLOCK)
        tl.store(ptr + elements, value, mask=elements < end)


@triton.jit
def write_bitmatrix(
    ids_ptr,
    map_ptr,
    map_size,
    bitmatrix_ptr,
    num_tokens,
    program,
    programs,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Which experts each token chose, 32 of them to a word; each program writes rows of its own."""
    WORDS: tl.constexpr = (NUM_EXPERTS + 31) // 32
    columns = tl.arange(0, BLOCK_K)[None, :]
    for start in range(program * ROWS, num_tokens, programs * ROWS):
        rows = start + tl.arange(0, ROWS)
        is_slot = (rows < num_tokens)[:, None] & (columns < TOP_K)
        slots = rows[:, None] * TOP_K + columns
        NO_EXPERT: tl.constexpr = 32 * WORDS  # a bit of the word behind the last
        experts = load_experts(ids_ptr, map_ptr, map_size, slots, is_slot, NUM_EXPERTS, NO_EXPERT)
        for word in range(WORDS):
            bits = tl.where((experts >> 5) == word, 1 << (experts & 31), 0)
            tl.store(bitmatrix_ptr + rows * WORDS + word, tl.reduce_or(bits, axis=1), mask=rows < num_tokens)


@triton.jit
def _store_offsets(ptr, counts, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Offsets [E + 1]: 0, then the inclusive sums."""
    experts = tl.arange(0, BLOCK_E)
    tl.store(ptr, 0)
    tl.store(ptr + 1 + experts, tl.cumsum(counts, axis=0), mask=experts < NUM_EXPERTS)


@triton.jit
def write_expert_structures(
    counts,  # [BLOCK_E] int32
    tokens_per_expert_ptr,
    expert_offsets_ptr,
    num_tokens_post_padded_ptr,
    block_offsets_ptr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write what follows from the number of each expert's slots alone; absent pointers are None."""
    experts = tl.arange(0, BLOCK_E)
    if tokens_per_expert_ptr is not None:
        tl.store(tokens_per_expert_ptr + experts, counts, mask=experts < NUM_EXPERTS)
    if expert_offsets_ptr is not None:
        _store_offsets(expert_offsets_ptr, counts, NUM_EXPERTS, BLOCK_E)
    if num_tokens_post_padded_ptr is not None:
        blocks = tl.sum(tl.cdiv(counts, BLOCK_SIZE), axis=0)
        tl.store(num_tokens_post_padded_ptr, blocks.to(tl.int64) * BLOCK_SIZE)
    if block_offsets_ptr is not None:
        for row in tl.static_range(_SCHEDULES):
            blocks = tl.cdiv(counts, _SMALLEST << row)
            _store_offsets(block_offsets_ptr + row * (NUM_EXPERTS + 1), blocks, NUM_EXPERTS, BLOCK_E)


@triton.jit
def _write_schedule(schedule_ptr, experts, ranks, counts, SIZE: tl.constexpr, BLOCK_E: tl.constexpr):
    """One row of the block schedule: the slots that start a block write its entry."""
    blocks = ranks // SIZE
    at = of_expert(starts_of(tl.cdiv(counts, SIZE)), experts, BLOCK_E) + blocks
    tl.store(schedule_ptr + at, (blocks << 16) | experts, mask=(experts < BLOCK_E) & (ranks % SIZE == 0))


@triton.jit
def write_slot_structures(
    experts,  # [BLOCK_S] of sorted slots
    slots,  # [BLOCK_S] int64
    positions,  # [BLOCK_S], of slots with an expert
    counts,  # [BLOCK_E] int32, of all slots
    num_slots,
    weights_ptr,
    permuted_idx_ptr,
    inv_permuted_idx_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    permuted_weights_ptr,
    block_schedule_ptr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write what each slot of a tile contributes; absent pointers are None."""
    has_expert = experts < BLOCK_E
    if permuted_idx_ptr is not None:
        tl.store(permuted_idx_ptr + positions, slots, mask=has_expert)
    if inv_permuted_idx_ptr is not None:
        tl.store(inv_permuted_idx_ptr + slots, tl.where(has_expert, positions, -1), mask=slots < num_slots)
    if permuted_weights_ptr is not None:
        weights = tl.load(weights_ptr + slots, mask=has_expert)
        tl.store(permuted_weights_ptr + positions, weights, mask=has_expert)
    HAS_BLOCKS: tl.constexpr = sorted_token_ids_ptr is not None or expert_ids_ptr is not None
    if HAS_BLOCKS or block_schedule_ptr is not None:
        ranks = positions - of_expert(starts_of(counts), experts, BLOCK_E)  # inside the expert
    if HAS_BLOCKS:
        first = of_expert(starts_of(tl.cdiv(counts, BLOCK_SIZE)), experts, BLOCK_E).to(tl.int64)
    if sorted_token_ids_ptr is not None:
        tl.store(sorted_token_ids_ptr + first * BLOCK_SIZE + ranks, slots, mask=has_expert)
    if expert_ids_ptr is not None:
        tl.store(expert_ids_ptr + first + ranks // BLOCK_SIZE, experts, mask=has_expert & (ranks % BLOCK_SIZE == 0))
    if block_schedule_ptr is not None:
        for row in tl.static_range(_SCHEDULES):
            _write_schedule(block_schedule_ptr, experts, ranks, counts, _SMALLEST << row, BLOCK_E)
            block_schedule_ptr += max_blocks(num_slots, NUM_EXPERTS, _SMALLEST)


@triton.jit
def write_unused(
    counts,  # [BLOCK_E] int32, of all slots
    num_slots,
    program,
    programs,
    permuted_idx_ptr,
    expert_ids_ptr,
    permuted_weights_ptr,
    block_schedule_ptr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Mark what no slot and no block uses, each program its part: -1, and weight 0."""
    used = tl.sum(counts, axis=0)
    if permuted_idx_ptr is not None:
        fill(permuted_idx_ptr, -1, used, num_slots, program, programs)
    if permuted_weights_ptr is not None:
        fill(permuted_weights_ptr, 0.0, used, num_slots, program, programs)
    if expert_ids_ptr is not None:
        used = tl.sum(tl.cdiv(counts, BLOCK_SIZE), axis=0)
        end = max_blocks(num_slots, NUM_EXPERTS, BLOCK_SIZE)
        fill(expert_ids_ptr, -1, used, end, program, programs)
    if block_schedule_ptr is not None:
        end = max_blocks(num_slots, NUM_EXPERTS, _SMALLEST)
        for row in tl.static_range(_SCHEDULES):
            used = tl.sum(tl.cdiv(counts, _SMALLEST << row), axis=0)
            fill(block_schedule_ptr, -1, used, end, program, programs)
            block_schedule_ptr += end


@triton.jit
def permute_in_one_program(
    ids_ptr,  # [T, K]
    map_ptr,  # [map_size] or None
    weights_ptr,  # [T, K] or None
    tokens_per_expert_ptr,
    expert_offsets_ptr,
    permuted_idx_ptr,
    inv_permuted_idx_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    bitmatrix_ptr,
    permuted_weights_ptr,
    block_offsets_ptr,
    block_schedule_ptr,
    num_tokens,
    map_size,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Order at most BLOCK_S slots whose ids lie in memory, and write what is not None."""
    program = tl.program_id(0).to(tl.int64)  # 0
    num_slots = num_tokens.to(tl.int64) * TOP_K
    slots = tl.arange(0, BLOCK_S)
    experts = load_experts(ids_ptr, map_ptr, map_size, slots, slots < num_slots, NUM_EXPERTS, BLOCK_E)
    counts = count_slots(experts, BLOCK_E)
    write_expert_structures(
        counts, tokens_per_expert_ptr, expert_offsets_ptr, num_tokens_post_padded_ptr, block_offsets_ptr,
        NUM_EXPERTS, BLOCK_SIZE, BLOCK_E,
    )  # fmt: skip
    if bitmatrix_ptr is not None:
        write_bitmatrix(
            ids_ptr, map_ptr, map_size, bitmatrix_ptr, num_tokens, program, 1, NUM_EXPERTS, TOP_K, BLOCK_K
        )  # fmt: skip
    if sorted_token_ids_ptr is not None:
        end = max_blocks(num_slots, NUM_EXPERTS, BLOCK_SIZE) * BLOCK_SIZE
        fill(sorted_token_ids_ptr, num_slots, program, end, program, 1)
        tl.debug_barrier()  # slots are written over it
    write_unused(
        counts, num_slots, program, 1,
        permuted_idx_ptr, expert_ids_ptr, permuted_weights_ptr, block_schedule_ptr, NUM_EXPERTS, BLOCK_SIZE,
    )  # fmt: skip
    experts, slots = sort_slots(experts, BLOCK_S)
    write_slot_structures(
        experts, slots.to(tl.int64), tl.arange(0, BLOCK_S), counts, num_slots, weights_ptr,
        permuted_idx_ptr, inv_permuted_idx_ptr, sorted_token_ids_ptr, expert_ids_ptr, permuted_weights_ptr,
        block_schedule_ptr, NUM_EXPERTS, BLOCK_SIZE, BLOCK_E,
    )  # fmt: skip
