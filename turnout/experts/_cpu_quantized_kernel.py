"""The numba kernels behind ``_cpu_quantized.py``. Importing this module imports numba.

``dequantize_*`` make float32 of rows [first, end) of a weight with scales [rows, columns / group] float32. The loops
are as they are so that they run in vector lanes.
"""

import numpy as np
from numba import carray, njit

from turnout.combine._cpu_kernel import pointer
from turnout.experts._cpu_kernel import activate


@njit(nogil=True, cache=True)
def scale_row(row, scales, group):
    """Multiply each group of a row with its scale."""
    for g in range(scales.shape[0]):
        scale, values = scales[g], row[g * group : (g + 1) * group]
        for i in range(group):
            values[i] *= scale


@njit(nogil=True, cache=True)
def dequantize_int4(weight_address, scale_address, columns, group, out_address, first, end):
    """Of int4, eight to a word, [rows, columns / 8] int32: a byte holds two, the lower half first."""
    weight = carray(pointer(weight_address), (end, columns // 2), np.uint8)
    scales = carray(pointer(scale_address), (end, columns // group), np.float32)
    out = carray(pointer(out_address), (end, columns), np.float32)
    for r in range(first, end):
        row, stored = out[r], weight[r]
        for i in range(columns // 2):
            both = np.int32(stored[i])
            row[2 * i] = np.float32((both & np.int32(15)) - np.int32(8))
            row[2 * i + 1] = np.float32((both >> np.int32(4)) - np.int32(8))
        scale_row(row, scales[r], group)


@njit(nogil=True, cache=True)
def dequantize_int8(weight_address, scale_address, columns, group, out_address, first, end):
    """Of int8 [rows, columns]."""
    weight = carray(pointer(weight_address), (end, columns), np.int8)
    scales = carray(pointer(scale_address), (end, columns // group), np.float32)
    out = carray(pointer(out_address), (end, columns), np.float32)
    for r in range(first, end):
        row, stored = out[r], weight[r]
        for i in range(columns):
            row[i] = np.float32(stored[i])
        scale_row(row, scales[r], group)


@njit(nogil=True, cache=True)
def dequantize_float8(weight_address, scale_address, columns, group, out_address, first, end):
    """Of float8_e4m3fn [rows, columns]: its exponent has a bias of 7, that of float32 one of 127."""
    weight = carray(pointer(weight_address), (end, columns), np.int8)
    scales = carray(pointer(scale_address), (end, columns // group), np.float32)
    out = carray(pointer(out_address), (end, columns), np.float32)
    out_bits = carray(pointer(out_address), (end, columns), np.int32)
    sign_and_magnitude, nan = np.int32(-0x78100000), np.int32(0x7FC00000)  # bits 31 and 26 to 20
    for r in range(first, end):
        row, bits, stored = out[r], out_bits[r], weight[r]
        for i in range(columns):
            value = np.int32(stored[i])
            is_nan = (value & np.int32(0x7F)) == np.int32(0x7F)
            bits[i] = nan if is_nan else (value << np.int32(20)) & sign_and_magnitude
        for i in range(columns):
            row[i] *= np.float32(2.0**120)
        scale_row(row, scales[r], group)


@njit(nogil=True, cache=True)
def activate_numbers(address, count, activation, alpha, limit, up_offset, first, end):
    """``activation(gate) * (up + up_offset)`` of numbers [first, end) of ``count``, over gate, which up follows."""
    gate = carray(pointer(address), 2 * count, np.float32)[first:end]
    up = carray(pointer(address), 2 * count, np.float32)[count + first : count + end]
    activate(gate, up, activation, alpha, limit, up_offset)
