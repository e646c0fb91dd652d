"""The numba kernel behind ``cpu.py``. Importing this module imports numba."""

import numpy as np
from numba import carray, njit

from turnout.routing._cpu_kernel import pointer


@njit(nogil=True, cache=True)
def store(address, is_64_bit, index, value):
    """Write element ``index`` of an array of int32 or int64; nothing where the address is 0."""
    if address == 0:
        return
    if is_64_bit:
        carray(pointer(address), index + 1, np.int64)[index] = value
    else:
        carray(pointer(address), index + 1, np.int32)[index] = value


@njit(nogil=True, cache=True)
def load_experts(ids_address, ids_code, map_address, map_size, num_slots, num_experts, experts):
    """The expert of each slot, through the map if there is one; num_experts for an id that is none."""
    expert_map = carray(pointer(map_address), map_size, np.int32)
    ids16 = carray(pointer(ids_address), num_slots, np.int16)
    ids32 = carray(pointer(ids_address), num_slots, np.int32)
    ids64 = carray(pointer(ids_address), num_slots, np.int64)
    for slot in range(num_slots):
        if ids_code == 0:
            expert = np.int64(ids16[slot])
        elif ids_code == 1:  # a uint32 that is an expert's has the same bits
            expert = np.int64(ids32[slot])
        else:
            expert = ids64[slot]
        if map_address:
            expert = np.int64(expert_map[expert]) if 0 <= expert < map_size else np.int64(-1)
        experts[slot] = expert if 0 <= expert < num_experts else num_experts


@njit(nogil=True, cache=True)
def write_offsets(address, is_64_bit, first, counts, block_size, num_experts):
    """Offsets [E + 1] of each expert's blocks, from element ``first`` on.

    Returns:
        The last of them, the number of all blocks.
    """
    offset = np.int64(0)
    for expert in range(num_experts):
        store(address, is_64_bit, first + expert, offset)
        offset += (counts[expert] + block_size - 1) // block_size
    store(address, is_64_bit, first + num_experts, offset)
    return offset


@njit(nogil=True, cache=True)
def write_blocks(
    experts, slots, counts, block_size, max_blocks, sorted_address, expert_ids_address, post_padded_address, is_64_bit
):  # fmt: skip
    """The padded block map; ``slots`` are sorted, ``experts`` in the order of slots."""
    num_slots, block, position = len(experts), np.int64(0), 0
    for expert in range(len(counts) - 1):
        for rank in range(-(-counts[expert] // block_size) * block_size):
            slot = slots[position] if rank < counts[expert] else num_slots
            position += rank < counts[expert]
            store(sorted_address, is_64_bit, block * block_size + rank % block_size, slot)
            if rank % block_size == block_size - 1:
                store(expert_ids_address, is_64_bit, block, expert)
                block += 1
    store(post_padded_address, is_64_bit, 0, block * block_size)
    for unused in range(block, max_blocks):
        store(expert_ids_address, is_64_bit, unused, -1)
    for unused in range(block * block_size, max_blocks * block_size):
        store(sorted_address, is_64_bit, unused, num_slots)


@njit(nogil=True, cache=True)
def write_schedule(address, is_64_bit, first, counts, block_size, max_blocks):
    """One row of the block schedule, from element ``first`` on."""
    at = first
    for expert in range(len(counts) - 1):
        for block in range(-(-counts[expert] // block_size)):
            store(address, is_64_bit, at, block << 16 | expert)
            at += 1
    for unused in range(at, first + max_blocks):
        store(address, is_64_bit, unused, -1)


@njit(nogil=True, cache=True)
def write_bitmatrix(address, experts, top_k, num_experts):
    """Which experts each token chose."""
    words = (num_experts + 31) // 32
    num_tokens = len(experts) // top_k
    bits = carray(pointer(address), num_tokens * words, np.uint32)
    bits[:] = 0
    for slot in range(len(experts)):
        if experts[slot] < num_experts:
            bits[slot // top_k * words + experts[slot] // 32] |= np.uint32(1) << np.uint32(experts[slot] % 32)


@njit(nogil=True, cache=True)
def write_weights(weights_address, permuted_address, element_size, slots, used):
    """Weights in the order of ``slots``; they are moved as integers of their size, and 0 is 0 in each dtype."""
    words = carray(pointer(weights_address), len(slots), np.int32)
    halves = carray(pointer(weights_address), len(slots), np.int16)
    permuted_words = carray(pointer(permuted_address), len(slots), np.int32)
    permuted_halves = carray(pointer(permuted_address), len(slots), np.int16)
    for position in range(len(slots)):
        if element_size == 4:
            permuted_words[position] = words[slots[position]] if position < used else 0
        else:
            permuted_halves[position] = halves[slots[position]] if position < used else 0


@njit(nogil=True, cache=True)
def permute_slots(
    ids_address, ids_code, map_address, map_size, num_tokens, top_k, num_experts, is_64_bit, block_size, max_blocks,
    schedules, smallest, max_scheduled, weights_address, weights_size, tokens_per_expert, expert_offsets, permuted_idx,
    inv_permuted_idx, sorted_token_ids, expert_ids, num_tokens_post_padded, bitmatrix, permuted_weights, block_offsets,
    block_schedule,
):  # fmt: skip
    """Order slots by a counting sort, and write the structures; addresses of those that are absent are 0.

    Returns:
        How many slots have a position.
    """
    num_slots = num_tokens * top_k
    experts = np.empty(num_slots, np.int64)
    load_experts(ids_address, ids_code, map_address, map_size, num_slots, num_experts, experts)
    counts = np.zeros(num_experts + 1, np.int64)  # the last: slots without an expert
    for slot in range(num_slots):
        counts[experts[slot]] += 1
    next_positions = np.cumsum(counts) - counts
    used = next_positions[num_experts]
    slots = np.empty(num_slots, np.int64)
    for slot in range(num_slots):
        position = next_positions[experts[slot]]
        next_positions[experts[slot]] += 1
        slots[position] = slot
        store(permuted_idx, is_64_bit, position, slot if position < used else -1)
        store(inv_permuted_idx, is_64_bit, slot, position if position < used else -1)
    if tokens_per_expert:
        for expert in range(num_experts):
            store(tokens_per_expert, is_64_bit, expert, counts[expert])
    write_offsets(expert_offsets, is_64_bit, 0, counts, 1, num_experts)
    if sorted_token_ids or expert_ids or num_tokens_post_padded:
        write_blocks(
            experts, slots, counts, block_size, max_blocks, sorted_token_ids, expert_ids, num_tokens_post_padded,
            is_64_bit,
        )  # fmt: skip
    if bitmatrix:
        write_bitmatrix(bitmatrix, experts, top_k, num_experts)
    if permuted_weights:
        write_weights(weights_address, permuted_weights, weights_size, slots, used)
    for row in range(schedules):
        size = smallest << row
        if block_offsets:
            write_offsets(block_offsets, is_64_bit, row * (num_experts + 1), counts, size, num_experts)
        if block_schedule:
            write_schedule(block_schedule, is_64_bit, row * max_scheduled, counts, size, max_scheduled)
    return used
