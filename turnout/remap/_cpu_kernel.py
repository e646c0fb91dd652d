"""The numba kernel behind ``cpu.py``. Importing this module imports numba."""

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def _pointer(typingctx, address):
    """An address as the pointer that ``carray`` takes."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@njit(nogil=True, cache=True)
def place_slots(
    ids_address, are_ids_int64, map_address, map_size, num_tokens, top_k, num_experts,
    counts_address, positions_address, tokens_address,
):  # fmt: skip
    """Count the slots of each expert, give each slot its position, and each position its token.

    Slots that are skipped get position -1, and no position their token; the address of an absent map is 0.

    Returns:
        How many slots have a position.
    """
    num_slots = num_tokens * top_k
    ids32 = carray(_pointer(ids_address), num_slots, np.int32)
    ids64 = carray(_pointer(ids_address), num_slots, np.int64)
    expert_map = carray(_pointer(map_address), map_size, np.int32)
    counts = carray(_pointer(counts_address), num_experts, np.int32)
    positions = carray(_pointer(positions_address), num_slots, np.int32)
    token_at = carray(_pointer(tokens_address), num_slots, np.int64)
    ends = np.zeros(num_experts + 1, np.int64)  # of the experts, shifted by one: the second pass fills them up

    for slot in range(num_slots):
        expert = ids64[slot] if are_ids_int64 else np.int64(ids32[slot])
        if map_address:
            expert = np.int64(expert_map[expert]) if 0 <= expert < map_size else np.int64(-1)
        if expert < 0 or expert >= num_experts:
            expert = np.int64(-1)
        positions[slot] = expert
        ends[expert + 1] += 1
    num_skipped = ends[0]
    ends[0] = 0
    for expert in range(num_experts):
        counts[expert] = ends[expert + 1]
        ends[expert + 1] += ends[expert]
    for token in range(num_tokens):
        for slot in range(token * top_k, (token + 1) * top_k):
            expert = positions[slot]
            if expert >= 0:
                positions[slot] = ends[expert]
                token_at[ends[expert]] = token
                ends[expert] += 1
    return num_slots - num_skipped


@njit(nogil=True, cache=True)
def name_experts(counts_address, num_experts, experts_address, num_rows):
    """The expert of each row, counts of rows given; -1 for rows that belong to none."""
    counts = carray(_pointer(counts_address), num_experts, np.int32)
    expert_of_row = carray(_pointer(experts_address), num_rows, np.int32)
    row = 0
    for expert in range(num_experts):
        for _ in range(min(counts[expert], num_rows - row)):
            expert_of_row[row] = expert
            row += 1
    while row < num_rows:
        expert_of_row[row] = -1
        row += 1
