"""Products with quantised weights, and their parts: int4 in words, float8 on its bits, rounding to numbers."""

import triton
import triton.language as tl

from turnout.device.rounding import narrowed, round_to, widened


@triton.jit
def product(
    value_ptrs,  # [BLOCK_M], the rows of values
    weight_ptrs,  # [BLOCK_N], the rows of a weight
    scale_ptrs,  # [BLOCK_N], the rows of its scales
    is_value,  # [BLOCK_M]
    is_row,  # [BLOCK_N]
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; None: all
    INT4: tl.constexpr,
    WIDEN: tl.constexpr,  # float8 on a device that cannot multiply it: weight and values come as bytes
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``values @ weight.T`` [BLOCK_M, BLOCK_N] in float32, weight scales included, those of the values not."""
    columns = tl.arange(0, BLOCK_K)
    EXACT: tl.constexpr = value_ptrs.dtype.element_ty == tl.int8
    TOTAL: tl.constexpr = tl.int32 if EXACT and not INT4 else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_N], TOTAL)
    for start in range(0, COLUMNS, BLOCK_K):
        is_column = tl.full([BLOCK_K], True, tl.int1) if COLUMNS % BLOCK_K == 0 else columns < COLUMNS - start
        values = tl.load(
            value_ptrs[:, None] + start + columns[None, :], mask=is_value[:, None] & is_column[None, :], other=0.0
        )
        if INT4:
            weight = load_int4(weight_ptrs, is_row, start, BLOCK_K)
            if EXACT:  # a group's products are summed as integers
                scale = widened(tl.load(scale_ptrs + start // GROUP, mask=is_row, other=0.0))
                partial = tl.dot(values, tl.trans(weight.to(tl.int8)), out_dtype=tl.int32)
                total += partial.to(tl.float32) * scale[None, :]
            else:
                weight = scaled(weight, scale_ptrs, is_row, start, GROUP, BLOCK_N, BLOCK_K)
                weight = narrowed(weight, values.dtype)
                total = tl.dot(values, tl.trans(weight), total, input_precision="ieee")
        else:
            mask = is_row[:, None] & is_column[None, :]
            weight = tl.load(weight_ptrs[:, None] + start + columns[None, :], mask=mask, other=0.0)
            if EXACT:
                total = tl.dot(values, tl.trans(weight), total, out_dtype=tl.int32)
            elif WIDEN:
                total = tl.dot(half_of_e4m3(values), tl.trans(half_of_e4m3(weight)), total)
            else:  # the tensor cores of Hopper add float8 products in few bits: each step is added in float32
                total = tl.dot(values, tl.trans(weight), total, max_num_imprecise_acc=BLOCK_K)
    total = total.to(tl.float32)
    if not INT4:
        total *= widened(tl.load(scale_ptrs, mask=is_row, other=0.0))[None, :]
    return total


@triton.jit
def load_int4(word_ptrs, is_row, start, BLOCK_K: tl.constexpr):
    """Columns [start, start + BLOCK_K) of rows of int4 in words of eight, as int32 in [-8, 7]."""
    words = tl.arange(0, BLOCK_K // 8)
    words = tl.load(word_ptrs[:, None] + start // 8 + words[None, :], mask=is_row[:, None], other=0)
    words = tl.interleave(words, words)
    words = tl.interleave(words, words)
    words = tl.interleave(words, words)
    nibble = (tl.arange(0, BLOCK_K) & 7) << 2
    return ((words >> nibble[None, :]) & 15) - 8


@triton.jit
def scaled(values, scale_ptrs, is_row, start, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Values [BLOCK_N, BLOCK_K] times the scales of their groups, in float32; BLOCK_K divides GROUP, or GROUP it."""
    values = values.to(tl.float32)
    if GROUP >= BLOCK_K:
        return values * widened(tl.load(scale_ptrs + start // GROUP, mask=is_row, other=0.0))[:, None]
    else:
        groups = tl.arange(0, BLOCK_K // GROUP)
        scale_ptrs = scale_ptrs[:, None] + start // GROUP + groups[None, :]
        scale = widened(tl.load(scale_ptrs, mask=is_row[:, None], other=0.0))
        values = tl.reshape(values, [BLOCK_N, BLOCK_K // GROUP, GROUP]) * scale[:, :, None]
        return tl.reshape(values, [BLOCK_N, BLOCK_K])


@triton.jit
def half_of_e4m3(bits):
    """The value of float8_e4m3fn bits (uint8), as float16, exactly; NaN stays NaN."""
    bits = bits.to(tl.int16)
    magnitude = bits & 0x7F
    half = ((bits & 0x80) << 8) | (magnitude << 7)
    half = tl.where(magnitude == 0x7F, 0x7E00, half).to(tl.int16)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def e4m3_of(values):
    """float32 values in [-448, 448], or NaN, rounded to nearest even in float8_e4m3fn, as its bits (uint8).

    On the bits: not every GPU converts to float8.
    """
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    tiny = magnitude.to(tl.float32, bitcast=True) * 512.0  # below 2^-6: in steps of 2^-9
    subnormal = round_to_integer(tl.where(magnitude < 0x3C800000, tiny, 0.0)).to(tl.int32)
    rounded = tl.where(magnitude < 0x3C800000, subnormal, normal)
    rounded = tl.where(magnitude > 0x7F800000, 0x7F, rounded)
    return (rounded | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def round_to_integer(values):
    """float32 values below 2^22 rounded to the nearest integer, ties to even, still as float32."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def quantized(values, HIGHEST: tl.constexpr, SPAN: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """Rows [R, columns] of float32 values of DTYPE over their scales, and these scales [R, 1].

    What `turnout.experts.quantization.quantize_activations` does, up to the last rounding. NaN comes through: the
    largest magnitude is taken on the bits.
    """
    magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)[:, None]
    scale = round_to(tl.div_rn(largest, tl.full(largest.shape, SPAN / 2, tl.float32)), DTYPE)
    scale = tl.where(scale == 0.0, EPS, scale)
    quotient = round_to(tl.div_rn(values, tl.broadcast_to(scale, values.shape)), DTYPE)
    lowest = HIGHEST - SPAN
    return tl.where(quotient < lowest, lowest, tl.where(quotient > HIGHEST, HIGHEST, quotient)), scale
