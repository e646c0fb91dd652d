"""float32 to the 16-bit formats and back."""

import triton
import triton.language as tl


@triton.jit
def round_to(values, DTYPE: tl.constexpr):
    """float32 values rounded to nearest even in DTYPE, still as float32; NaN stays NaN.

    bfloat16 is rounded on the bits: Triton's interpreter truncates where the hardware rounds. The NaN of NVIDIA's
    arithmetic has all bits set: rounded like a number, it would become -0.0.
    """
    if DTYPE == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = tl.where(values == values, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return values.to(DTYPE).to(tl.float32)


@triton.jit
def widened(values):
    """Floats of any of the three dtypes as float32, exactly.

    bfloat16 is widened on the bits: Triton's interpreter loses its subnormals, which the hardware keeps.
    """
    if values.dtype == tl.bfloat16:
        return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def narrowed(values, DTYPE: tl.constexpr):
    """float32 values rounded to nearest even in DTYPE, in DTYPE; bfloat16 on the bits, as in `widened`."""
    if DTYPE == tl.bfloat16:
        bits = round_to(values, DTYPE).to(tl.int32, bitcast=True) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(DTYPE)
