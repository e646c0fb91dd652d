"""Rounding of float32 values to the 16-bit formats."""

import triton
import triton.language as tl


@triton.jit
def round_to(values, DTYPE: tl.constexpr):
    """Finite float32 values rounded to nearest even in DTYPE, still as float32.

    bfloat16 is rounded on the bits: Triton's interpreter truncates where the hardware rounds.
    """
    if DTYPE == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return values.to(DTYPE).to(tl.float32)
