"""Score functions in Triton: those of `turnout.routing.scores`, step by step, so that the bits are the same.

That holds for kernels launched with ``EXACT``: a multiplication fused with an addition would round once, not twice.
"""

import triton
import triton.language as tl

from turnout.device import polynomials
from turnout.device.rounding import round_to
from turnout.device.softmax import tree_sum

EXACT = {"enable_fp_fusion": False}  # options of a launch

_LOG2_E = tl.constexpr(polynomials.LOG2_E)
_LN2_HIGH, _LN2_LOW = tl.constexpr(polynomials.LN2_HIGH), tl.constexpr(polynomials.LN2_LOW)
_EXP_MIN, _EXP_MAX = tl.constexpr(polynomials.EXP_MIN), tl.constexpr(polynomials.EXP_MAX)
_EXP_COEFFICIENTS = tl.constexpr(polynomials.EXP_COEFFICIENTS)
_LOG_COEFFICIENTS = tl.constexpr(polynomials.LOG_COEFFICIENTS)
_SQRT_2 = tl.constexpr(2**0.5)
_LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr, TERMS: tl.constexpr):
    """The value at x, by Horner's rule, of a polynomial whose highest coefficient comes first."""
    y = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, TERMS):
        y = y * x + COEFFICIENTS[i]
    return y


@triton.jit
def exp(x):
    """The exponential of float32 values; of NaN, anything."""
    clamped = tl.minimum(tl.maximum(x, _EXP_MIN), _EXP_MAX)
    n = tl.floor(clamped * _LOG2_E + 0.5)
    r = clamped - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    y = polynomial(r, _EXP_COEFFICIENTS, 6)
    y = y * (r * r) + r + 1.0
    y = y * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    y = tl.where(x < _EXP_MIN, 0.0, y)
    return tl.where(x > _EXP_MAX, float("inf"), y)


@triton.jit
def log1p(e):
    """log(1 + e) of float32 values from 0 to 1."""
    u = 1.0 + e
    is_large = u > _SQRT_2
    r = tl.where(is_large, u * 0.5, u) - 1.0
    z = r * r
    y = polynomial(r, _LOG_COEFFICIENTS, 9) * r * z
    y = tl.where(is_large, y + _LN2_LOW, y)
    y = y - z * 0.5
    y = r + y
    y = tl.where(is_large, y + _LN2_HIGH, y)
    lost = u - 1.0
    return tl.where(lost == 0.0, e, y * tl.div_rn(e, tl.where(lost == 0.0, 1.0, lost)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of float32 values; 0 below -87."""
    return tl.div_rn(1.0, 1.0 + exp(-x))


@triton.jit
def sqrtsoftplus(x):
    """sqrt(log(1 + exp(x))) of float32 values."""
    return tl.sqrt_rn(tl.minimum(tl.maximum(x, 0.0), _LARGEST) + log1p(exp(-tl.abs(x))))


@triton.jit
def tanh(x):
    """The hyperbolic tangent of float32 values."""
    e = exp(-2.0 * tl.abs(x))
    y = tl.div_rn(1.0 - e, 1.0 + e)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def row_max(values, is_valid):
    """The largest of each row's valid values: [ROWS, 1]."""
    return tl.max(tl.where(is_valid, values, float("-inf")), axis=1)[:, None]


@triton.jit
def softmax_mass(values, best):
    """What a softmax divides by its total."""
    return tl.where(values == best, 1.0, exp(values - best))


@triton.jit
def softmax_total(values, best, is_expert, TOP_K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """What the masses of each row are divided by: [ROWS, WIDTH] -> [ROWS, 1]; best is the row's largest value."""
    total = tree_sum(tl.where(is_expert, softmax_mass(values, best), 0.0), ROWS, WIDTH)
    return tl.where(best == float("-inf"), TOP_K, total)  # nothing but -inf: K equal shares


@triton.jit
def without_nan(logits):
    """Logits, and -inf in place of NaN."""
    return tl.where(logits != logits, float("-inf"), logits)


@triton.jit
def capped(values, RECIPE: tl.constexpr):
    """Logits scaled and capped: the values that scores are taken of."""
    if RECIPE.logit_scale != 1.0:
        values = values * RECIPE.logit_scale
    if RECIPE.logit_softcap is not None:
        values = tanh(tl.div_rn(values, RECIPE.logit_softcap)) * RECIPE.logit_softcap
    return values


@triton.jit
def scores(values, best, total, RECIPE: tl.constexpr, DTYPE: tl.constexpr):
    """The score of each value, rounded to DTYPE; best and total are the row's, for a softmax."""
    if RECIPE.scoring_func == "softmax":
        mass = softmax_mass(values, best)
        values = tl.div_rn(mass, tl.broadcast_to(total, mass.shape))
    elif RECIPE.scoring_func == "sigmoid":
        values = sigmoid(values)
    else:
        if RECIPE.scoring_func == "sqrtsoftplus":
            values = sqrtsoftplus(values)
        largest = largest_of(DTYPE)
        values = tl.minimum(tl.maximum(values, -largest), largest)
    return round_to(values, DTYPE)


@triton.jit
def largest_of(DTYPE: tl.constexpr):
    """The largest number of a dtype."""
    if DTYPE == tl.float16:
        return 65504.0
    elif DTYPE == tl.bfloat16:
        return 3.3895313892515355e38
    else:
        return _LARGEST
