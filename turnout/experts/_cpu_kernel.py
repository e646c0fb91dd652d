"""The numba kernels behind ``cpu.py``. Importing this module imports numba.

Slots are handled in blocks of up to ROWS that chose the same expert: a weight is read once for a block. Arrays of
floats are read as in ``combine._cpu_kernel``.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import carray, njit

from turnout.combine._cpu_kernel import FAST, combine_rows, pointer, read, weight_at, widened, write

ROWS = 4  # rows of hidden states that a weight in a register is multiplied with
TILE = 8  # rows of a weight, and
CHUNK = 1024  # columns of it, that stay in the nearest cache while they are multiplied with all rows of a block
SUM = 64  # columns of a transposed weight that are summed by themselves, which keeps the sum of all of them exact
SILU, GELU_TANH, GELU = 0, 1, 2  # codes of activations
GATE_UP, DOWN, COMBINE, ALL = 0, 1, 2, 3  # codes of the parts of a call


class Call(NamedTuple):
    """One call, as integers: addresses, sizes, codes. Positions are those of the slots in the order of experts."""

    hidden: int  # [T, H]
    hidden_stride: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    gate_up: int  # [E, 2I, H] or transposed
    down: int  # [E, H, I] or transposed
    gate_up_bias: int  # [E, 2I], or 0
    down_bias: int  # [E, H], or 0
    transposed: bool
    interleaved: bool
    activation: int
    alpha: float
    limit: float  # infinite: none
    up_offset: float
    order: int  # [S] int32, position -> slot
    positions: int  # [S] int32, slot -> position
    blocks: int  # [num_blocks, 3] int32: expert, first position, end
    num_slots: int
    num_blocks: int
    block_rows: int
    activated: int  # [S, I], by position
    slot_out: int  # [S, H], by position
    topk_weights: int  # [T, K]
    weights_code: int
    out: int  # [T, H]


@njit(nogil=True, cache=True)
def sort_slots(
    ids_address, ids_code, weights_address, weights_code, num_slots, num_experts, block_rows, max_rows,
    offsets_address, order_address, positions_address, blocks_address,
):  # fmt: skip
    """Order the slots by expert: offsets [E + 1], position -> slot, slot -> position (-1: skipped), all int32.

    Skipped are slots whose id is no expert or whose weight is 0. The slots of experts with at most ``max_rows`` are
    cut into blocks of ``block_rows``: expert, first position, end.

    Returns:
        The numbers of blocks, of slots in them, and of slots that are not skipped.
    """
    ids16 = carray(pointer(ids_address), num_slots, np.int16)
    ids32 = carray(pointer(ids_address), num_slots, np.int32)
    ids64 = carray(pointer(ids_address), num_slots, np.int64)
    offsets = carray(pointer(offsets_address), num_experts + 1, np.int32)
    order = carray(pointer(order_address), num_slots, np.int32)
    positions = carray(pointer(positions_address), num_slots, np.int32)
    blocks = carray(pointer(blocks_address), (num_slots, 3), np.int32)
    ends = np.zeros(num_experts + 1, np.int64)  # of the experts, shifted by one: the second pass fills them up

    for slot in range(num_slots):
        expert = ids64[slot] if ids_code == 2 else np.int64(ids32[slot]) if ids_code == 1 else np.int64(ids16[slot])
        weight = weight_at(weights_address, weights_code, slot)
        if expert < 0 or expert >= num_experts or weight == 0:
            expert = np.int64(-1)
        else:
            ends[expert + 1] += 1
        positions[slot] = expert
    offsets[0] = 0
    for expert in range(num_experts):
        ends[expert + 1] += ends[expert]
        offsets[expert + 1] = ends[expert + 1]
    for slot in range(num_slots):
        expert = np.int64(positions[slot])
        if expert >= 0:
            positions[slot] = ends[expert]
            order[ends[expert]] = slot
            ends[expert] += 1

    num_blocks = num_rows = 0
    for expert in range(num_experts):
        rows = offsets[expert + 1] - offsets[expert]
        if rows <= max_rows:
            num_rows += rows
            for start in range(offsets[expert], offsets[expert + 1], block_rows):
                blocks[num_blocks, 0] = expert
                blocks[num_blocks, 1] = start
                blocks[num_blocks, 2] = min(start + block_rows, offsets[expert + 1])
                num_blocks += 1
    return num_blocks, num_rows, offsets[num_experts]


@njit(nogil=True, cache=True, fastmath=FAST)
def dot(weights, values, start, end):
    """Sum of products of two rows from ``start`` to ``end``."""
    total = np.float32(0.0)
    for j in range(np.uint64(start), np.uint64(end)):
        total += widened(weights[j]) * values[j]
    return total


@njit(nogil=True, cache=True, fastmath=FAST)
def dot4(weights, values, start, end):
    """Sums of products of one row and each of four."""
    total0 = total1 = total2 = total3 = np.float32(0.0)
    values0, values1, values2, values3 = values[0], values[1], values[2], values[3]
    for j in range(np.uint64(start), np.uint64(end)):
        weight = widened(weights[j])
        total0 += weight * values0[j]
        total1 += weight * values1[j]
        total2 += weight * values2[j]
        total3 += weight * values3[j]
    return total0, total1, total2, total3


@njit(nogil=True, cache=True)
def project_rows(weights, first, count, values, rows, out):
    """``out[r, n] = weights[first + n] . values[r]``."""
    columns = weights.shape[1]
    chunk = CHUNK if rows >= ROWS else columns  # few rows stay in the cache, and weights are read in one stream
    for r in range(rows):
        out[r].fill(0)
    for start in range(0, columns, chunk):
        end = min(columns, start + chunk)
        for tile in range(0, count, TILE):
            for r in range(0, rows, ROWS):
                for n in range(tile, min(count, tile + TILE)):
                    row = weights[first + n]
                    if r + ROWS <= rows:
                        total0, total1, total2, total3 = dot4(row, values[r : r + ROWS], start, end)
                        out[r, n] += total0
                        out[r + 1, n] += total1
                        out[r + 2, n] += total2
                        out[r + 3, n] += total3
                    else:
                        for last in range(r, rows):
                            out[last, n] += dot(row, values[last], start, end)


@njit(nogil=True, cache=True, fastmath=FAST)
def add_scaled_from(total, weights, first, value):
    """``total += value * weights[first:]``."""
    for n in range(np.uint64(total.shape[0])):
        total[n] += widened(weights[np.uint64(first) + n]) * value


@njit(nogil=True, cache=True)
def project_columns(weights, first, count, values, rows, out):
    """``out[r, n] = weights[:, first + n] . values[r]``."""
    depth = weights.shape[0]
    for r in range(rows):
        out[r].fill(0)
    part = np.empty(count, np.float32)
    for start in range(0, depth, SUM):
        for r in range(rows):
            part.fill(0)
            for k in range(start, min(depth, start + SUM)):
                add_scaled_from(part, weights[k], first, values[r, k])
            for n in range(count):
                out[r, n] += part[n]


@njit(nogil=True, cache=True)
def project(like, address, transposed, shape, first, count, values, rows, out):
    """``rows`` rows of ``values`` times ``count`` outputs of a weight from ``first`` on, into ``out``.

    The outputs of a weight are its rows, or transposed its columns.
    """
    weights = carray(pointer(address), shape, like.dtype)
    if transposed:
        project_columns(weights, first, count, values, rows, out)
    else:
        project_rows(weights, first, count, values, rows, out)


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def exp(value):
    """The exponential of a number clamped to [-87, 88], to one unit in the last place.

    Source: ``expf`` of the Cephes library. Written out, since a loop over it runs in vector lanes.
    """
    value = min(max(value, np.float32(-87.0)), np.float32(88.0))
    power = np.floor(value * np.float32(1.44269504) + np.float32(0.5))
    rest = value - power * np.float32(0.693359375)
    rest = rest - power * np.float32(-2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    two_to_the_power = np.int32(np.int32(np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (series * rest * rest + rest + np.float32(1.0)) * two_to_the_power


@njit(nogil=True, cache=True, error_model="numpy")
def activate(gate, up, activation, alpha, limit, up_offset):
    """``activation(gate) * (up + up_offset)`` into ``gate``."""
    alpha, limit, up_offset = np.float32(alpha), np.float32(limit), np.float32(up_offset)
    one, half = np.float32(1.0), np.float32(0.5)
    if limit < np.inf:
        for i in range(gate.shape[0]):
            gate[i] = limit if gate[i] > limit else gate[i]
            up[i] = limit if up[i] > limit else -limit if up[i] < -limit else up[i]
    if activation == SILU:
        for i in range(gate.shape[0]):
            gate[i] = gate[i] / (one + exp(-alpha * gate[i])) * (up[i] + up_offset)
    elif activation == GELU_TANH:  # (1 + tanh(z)) / 2 = sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3)
        for i in range(gate.shape[0]):
            value = gate[i]
            twice = np.float32(1.5957691216057308) * (value + np.float32(0.044715) * value * value * value)
            gate[i] = value / (one + exp(-twice)) * (up[i] + up_offset)
    else:
        for i in range(gate.shape[0]):
            cumulative = half * np.float32(math.erfc(-gate[i] * np.float32(0.7071067811865476)))
            gate[i] = gate[i] * cumulative * (up[i] + up_offset)


@njit(nogil=True, cache=True)
def split(first, second, interleaved, gate, up):
    """Gate and up from a row that holds both, alternating, or from the rows that hold them."""
    for i in range(gate.shape[0]):
        gate[i] = first[2 * i] if interleaved else first[i]
        up[i] = first[2 * i + 1] if interleaved else second[i]


@njit(nogil=True, cache=True)
def activate_block(like, call, gates, ups, rows, expert, first, start):
    """Bias and activation of a block's columns from ``start`` on, written to the positions from ``first`` on."""
    count, size = gates.shape[1], like.itemsize
    if call.gate_up_bias:
        bias = np.empty(2 * call.intermediate_size, np.float32)
        read(like, call.gate_up_bias + expert * 2 * call.intermediate_size * size, bias)
        step, apart = (2, 1) if call.interleaved else (1, call.intermediate_size)
        for r in range(rows):
            for i in range(count):
                gates[r, i] += bias[(start + i) * step]
                ups[r, i] += bias[(start + i) * step + apart]
    for r in range(rows):
        activate(gates[r], ups[r], call.activation, call.alpha, call.limit, call.up_offset)
        write(like, gates[r], call.activated + ((first + r) * call.intermediate_size + start) * size)


@njit(nogil=True, cache=True)
def gate_up_part(like, call, start, end):
    """Columns ``start`` to ``end`` of the activated values of all blocks."""
    blocks = carray(pointer(call.blocks), (call.num_blocks, 3), np.int32)
    order = carray(pointer(call.order), call.num_slots, np.int32)
    count, outputs, size = end - start, 2 * call.intermediate_size, like.itemsize
    hidden = np.empty((call.block_rows, call.hidden_size), np.float32)
    gates = np.empty((call.block_rows, count), np.float32)
    ups = np.empty((call.block_rows, count), np.float32)
    passes = 1 if call.interleaved else 2  # over the weight: gate and up lie together, or apart
    projected = np.empty((passes, call.block_rows, 2 * count // passes), np.float32)
    shape = (call.hidden_size, outputs) if call.transposed else (outputs, call.hidden_size)
    for b in range(call.num_blocks):
        expert, first, rows = np.int64(blocks[b, 0]), np.int64(blocks[b, 1]), blocks[b, 2] - blocks[b, 1]
        for r in range(rows):
            token = np.int64(order[first + r]) // call.top_k
            read(like, call.hidden + token * call.hidden_stride * size, hidden[r])
        weight = call.gate_up + expert * outputs * call.hidden_size * size
        for half in range(passes):
            at = 2 * start if call.interleaved else start + half * call.intermediate_size
            project(like, weight, call.transposed, shape, at, 2 * count // passes, hidden, rows, projected[half])
        for r in range(rows):
            split(projected[0, r], projected[passes - 1, r], call.interleaved, gates[r], ups[r])
        activate_block(like, call, gates, ups, rows, expert, first, start)


@njit(nogil=True, cache=True)
def down_part(like, call, start, end):
    """Columns ``start`` to ``end`` of the outputs of all blocks."""
    blocks = carray(pointer(call.blocks), (call.num_blocks, 3), np.int32)
    count, size = end - start, like.itemsize
    values = np.empty((call.block_rows, call.intermediate_size), np.float32)
    outputs, bias = np.empty((call.block_rows, count), np.float32), np.empty(count, np.float32)
    shape = (call.hidden_size, call.intermediate_size)
    if call.transposed:
        shape = (call.intermediate_size, call.hidden_size)
    for b in range(call.num_blocks):
        expert, first, rows = np.int64(blocks[b, 0]), np.int64(blocks[b, 1]), blocks[b, 2] - blocks[b, 1]
        for r in range(rows):
            read(like, call.activated + (first + r) * call.intermediate_size * size, values[r])
        weight = call.down + expert * call.hidden_size * call.intermediate_size * size
        project(like, weight, call.transposed, shape, start, count, values, rows, outputs)
        if call.down_bias:
            read(like, call.down_bias + (expert * call.hidden_size + start) * size, bias)
        for r in range(rows):
            if call.down_bias:
                for i in range(count):
                    outputs[r, i] += bias[i]
            write(like, outputs[r], call.slot_out + ((first + r) * call.hidden_size + start) * size)


@njit(nogil=True, cache=True)
def combine_part(like, call, start, end):
    """Tokens ``start`` to ``end`` of the result."""
    combine_rows(
        like, call.slot_out, call.hidden_size, call.topk_weights, call.weights_code, call.top_k,
        call.positions, 4, call.out, call.hidden_size, start, end,
    )  # fmt: skip


@njit(nogil=True, cache=True)
def gather_rows(like, gathered, first, start, end, *fields):
    """Copy hidden states to rows ``start`` to ``end`` of a buffer; row r is of the slot at position first + r."""
    call = Call(*fields)
    order = carray(pointer(call.order), call.num_slots, np.int32)
    size = call.hidden_size * like.itemsize
    for r in range(start, end):
        token = np.int64(order[first + r]) // call.top_k
        source = call.hidden + token * call.hidden_stride * like.itemsize
        row = carray(pointer(source), size, np.uint8)
        gathered_row = carray(pointer(gathered + r * size), size, np.uint8)
        for i in range(size):
            gathered_row[i] = row[i]


@njit(nogil=True, cache=True)
def activate_rows(like, gate_up, expert, first, start, end, *fields):
    """Activated values of rows ``start`` to ``end`` of a projection [rows, 2I] of the slots from ``first`` on."""
    call = Call(*fields)
    width = call.intermediate_size
    both = np.empty(2 * width, np.float32)
    gates, ups = np.empty((1, width), np.float32), np.empty((1, width), np.float32)
    for r in range(start, end):
        read(like, gate_up + r * 2 * width * like.itemsize, both)
        split(both, both[width:], call.interleaved, gates[0], ups[0])
        activate_block(like, call, gates, ups, 1, expert, first + r, 0)


@njit(nogil=True, cache=True)
def run_part(like, part, start, end, *fields):
    """A share of one part of a call, or all of it; ``fields`` are those of `Call`."""
    call = Call(*fields)
    if part in (GATE_UP, ALL):
        gate_up_part(like, call, 0 if part == ALL else start, call.intermediate_size if part == ALL else end)
    if part in (DOWN, ALL):
        down_part(like, call, 0 if part == ALL else start, call.hidden_size if part == ALL else end)
    if part in (COMBINE, ALL):
        combine_part(like, call, start, end)
