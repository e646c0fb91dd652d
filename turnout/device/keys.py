"""Integer keys that order floats as numbers, whatever their bits."""

import triton
import triton.language as tl

# Below every key of a number or NaN: lanes past the last expert, and experts already taken.
TAKEN = tl.constexpr(-(2**31))
NAN = tl.constexpr(-(2**31) + 1)
# ordered_key(-inf); what lies below is NaN.
MINUS_INF = tl.constexpr(-(2**31) + 0x7FFFFF)
# A float16 or bfloat16 value leaves the low bits of its float32 form free; a column number fits there.
COLUMN_MASK = tl.constexpr(0x1FFF)


@triton.jit
def ordered_key(values):
    """int32 keys of float32 values: -0.0 equals +0.0, NaN lies below -inf, all above TAKEN."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values != values, NAN, keys)


@triton.jit
def key_value(keys):
    """The float32 value of a key; -inf for NaN."""
    bits = tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
    return tl.where(keys < MINUS_INF, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def with_column(keys, columns):
    """Keys of 16-bit floats made unique: a lower column is a larger key among equal values."""
    return (keys & ~COLUMN_MASK) | (COLUMN_MASK - columns)


@triton.jit
def column_of(keys):
    """The column that `with_column` was given."""
    return COLUMN_MASK - (keys & COLUMN_MASK)


@triton.jit
def without_column(keys):
    """The key that `with_column` was given."""
    return tl.where(keys < 0, keys | COLUMN_MASK, keys & ~COLUMN_MASK)
