"""The numba kernel behind ``cpu.py``, and how it reads and writes floats. Importing this module imports numba.

Arrays of float32 are numbers, arrays of uint16 hold the bits of bfloat16, arrays of int16 those of float16. Kernels
take addresses, and an empty array ``like`` those that lie there: each is compiled for a dtype when that is met.
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LIKE = {"float32": np.empty(0, np.float32), "bfloat16": np.empty(0, np.uint16), "float16": np.empty(0, np.int16)}
BF16, FP16 = 1, 2  # codes of the dtypes of topk_weights; 0 is float32
# Products and sums may be contracted, and sums taken in the lanes of a vector; NaN and infinities keep their meaning.
FAST = {"reassoc", "contract", "nsz"}
_I32, _I16, _FLOAT, _HALF = ir.IntType(32), ir.IntType(16), ir.FloatType(), ir.HalfType()


@intrinsic
def pointer(typingctx, address):
    """An address as the pointer that ``carray`` takes."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def widened(typingctx, element):
    """The float32 value of an element of an array, exactly."""

    def same(context, builder, signature, args):
        return args[0]

    def of_bfloat(context, builder, signature, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _I32(16)), _FLOAT)

    def of_half(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], _HALF), _FLOAT)

    codegen = {types.float32: same, types.uint16: of_bfloat, types.int16: of_half}[element]
    return types.float32(element), codegen


@intrinsic
def narrowed(typingctx, value, like):
    """A float32 value rounded to nearest even, as an element of arrays ``like`` this one; NaN stays NaN."""

    def same(context, builder, signature, args):
        return args[0]

    def to_bfloat(context, builder, signature, args):
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, _I32(0x7FFF)), odd), _I32(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, _I32(0x7FC0), rounded), _I16)

    def to_half(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], _HALF), _I16)

    codegen = {types.float32: same, types.uint16: to_bfloat, types.int16: to_half}[like.dtype]
    return like.dtype(types.float32, like), codegen


@njit(nogil=True, cache=True)
def read(like, address, values):
    """Fill ``values`` with the floats at an address."""
    source = carray(pointer(address), values.shape, like.dtype)
    for j in range(values.shape[0]):
        values[j] = widened(source[j])


@njit(nogil=True, cache=True)
def write(like, values, address):
    """Write ``values`` to an address, each rounded once."""
    target = carray(pointer(address), values.shape, like.dtype)
    for j in range(values.shape[0]):
        target[j] = narrowed(values[j], like)


@njit(nogil=True, cache=True)
def weight_at(address, code, slot):
    """The weight of a slot."""
    if code == BF16:
        return widened(carray(pointer(address), slot + 1, np.uint16)[slot])
    if code == FP16:
        return widened(carray(pointer(address), slot + 1, np.int16)[slot])
    return carray(pointer(address), slot + 1, np.float32)[slot]


@njit(nogil=True, cache=True, fastmath=FAST)
def add_scaled(total, weight, row):
    """``total += weight * row``."""
    for j in range(total.shape[0]):
        total[j] += weight * widened(row[j])


@njit(nogil=True, cache=True)
def combine_rows(
    like, rows_address, row_stride, weights_address, weights_code, top_k, index_address, index_size, out_address,
    hidden_size, start, end,
):  # fmt: skip
    """Combine the tokens from ``start`` to ``end``; ``index_size``: bytes of an index, 0 where there is none."""
    total = np.empty(hidden_size, np.float32)
    index32 = carray(pointer(index_address), end * top_k, np.int32)
    index64 = carray(pointer(index_address), end * top_k, np.int64)
    for token in range(start, end):
        total.fill(0)
        for slot in range(token * top_k, (token + 1) * top_k):
            weight = weight_at(weights_address, weights_code, slot)
            row = np.int64(slot)
            if index_size == 4:
                row = np.int64(index32[slot])
            elif index_size == 8:
                row = index64[slot]
            if row >= 0 and weight != 0:
                at = rows_address + row * row_stride * like.itemsize
                add_scaled(total, weight, carray(pointer(at), total.shape, like.dtype))
        write(like, total, out_address + token * hidden_size * like.itemsize)
