"""The numba kernels behind ``cpu.py``. Importing this module imports numba."""

import numpy as np
from numba import carray, njit

from turnout.routing._cpu_kernel import pointer


@njit(nogil=True, cache=True)
def name_tokens(slots_address, num_slots, top_k):
    """The token of each slot, in place of it."""
    slots = carray(pointer(slots_address), num_slots, np.int32)
    for position in range(num_slots):
        slots[position] //= top_k


@njit(nogil=True, cache=True)
def name_experts(counts_address, num_experts, experts_address, num_rows):
    """The expert of each row, counts of rows given; -1 for rows that belong to none."""
    counts = carray(pointer(counts_address), num_experts, np.int32)
    expert_of_row = carray(pointer(experts_address), num_rows, np.int32)
    row = 0
    for expert in range(num_experts):
        for _ in range(min(counts[expert], num_rows - row)):
            expert_of_row[row] = expert
            row += 1
    while row < num_rows:
        expert_of_row[row] = -1
        row += 1
