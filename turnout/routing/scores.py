"""Score functions in torch, from operations that every machine rounds alike: multiply, add, divide, square root.

A selection that ranks scores depends on their last bit, and libraries differ there. So the reference and every kernel
compute exp and log by the same polynomials, step by step, with no step fused into another. They are accurate to one or
two units in the last place.
"""

from __future__ import annotations

import math

import torch

from turnout.device.polynomials import (
    EXP_COEFFICIENTS,
    EXP_MAX,
    EXP_MIN,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    LOG_COEFFICIENTS,
)
from turnout.spec import FLOAT32_MAX, RouterSpec


def exp(x: torch.Tensor) -> torch.Tensor:
    """The exponential of float32 values that are not NaN."""
    clamped = x.clamp(EXP_MIN, EXP_MAX)
    n = torch.floor(clamped * LOG2_E + 0.5)
    r = clamped - n * LN2_HIGH
    r = r - n * LN2_LOW
    y = torch.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        y = y * r + coefficient
    y = y * (r * r) + r + 1.0
    y = y * ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    y = torch.where(x < EXP_MIN, 0.0, y)
    return torch.where(x > EXP_MAX, math.inf, y)


def log1p(e: torch.Tensor) -> torch.Tensor:
    """log(1 + e) of float32 values from 0 to 1."""
    u = 1.0 + e
    is_large = u > math.sqrt(2)
    r = torch.where(is_large, u * 0.5, u) - 1.0
    y = torch.full_like(r, LOG_COEFFICIENTS[0])
    for coefficient in LOG_COEFFICIENTS[1:]:
        y = y * r + coefficient
    z = r * r
    y = y * r * z
    y = torch.where(is_large, y + LN2_LOW, y)
    y = y - z * 0.5
    y = r + y
    y = torch.where(is_large, y + LN2_HIGH, y)
    lost = u - 1.0  # what of e is left in u: the logarithm is stretched by the rest
    return torch.where(lost == 0, e, y * (e / torch.where(lost == 0, 1.0, lost)))


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)) of float32 values that are not NaN; 0 below -87."""
    return 1.0 / (1.0 + exp(-x))


def sqrtsoftplus(x: torch.Tensor) -> torch.Tensor:
    """sqrt(log(1 + exp(x))) of float32 values that are not NaN."""
    softplus = x.clamp(0.0, FLOAT32_MAX) + log1p(exp(-x.abs()))
    return softplus.double().sqrt().float()  # torch rounds a square root of float32 one way or the other on CPUs


def tanh(x: torch.Tensor) -> torch.Tensor:
    """The hyperbolic tangent of float32 values that are not NaN; near 0 its error is one of 1, not of its value."""
    e = exp(-2.0 * x.abs())
    y = (1.0 - e) / (1.0 + e)
    return torch.where(x < 0, -y, y)


def softmax(x: torch.Tensor, top_k: int) -> torch.Tensor:
    """Softmax of rows without NaN; infinite entries share alike, and nothing but -inf gives ``top_k`` equal shares."""
    best = x.amax(dim=-1, keepdim=True)
    mass = torch.where(x == best, 1.0, exp(x - best))
    return mass / torch.where(best == -math.inf, float(top_k), tree_sum(mass))


def tree_sum(values: torch.Tensor) -> torch.Tensor:
    """Row sums by halves, padded to a power of two: the same rounding for any batch and any kernel."""
    width = 1 << (values.shape[1] - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, width - values.shape[1]))
    while width > 1:
        width //= 2
        values = values[:, :width] + values[:, width:]
    return values


def capped(logits: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """The values that scores are taken of: logits scaled and capped, NaN as -inf."""
    values = torch.where(logits.isnan(), -math.inf, logits)
    if spec.logit_scale != 1.0:
        values = values * spec.logit_scale
    if spec.logit_softcap is not None:
        cap = torch.full_like(values, spec.logit_softcap)  # CUDA multiplies by the reciprocal of a Python number
        values = tanh(values / cap) * cap
    return values


def scores(values: torch.Tensor, spec: RouterSpec, dtype: torch.dtype) -> torch.Tensor:
    """The score of each expert, [T, E] or of some of them, rounded to ``dtype`` where the model rounds it.

    Finite: a logit of infinity, as a score, counts as the largest number of the dtype.
    """
    if spec.scoring_func == "softmax":
        values = softmax(values, spec.top_k)
    elif spec.scoring_func == "sigmoid":
        values = sigmoid(values)
    elif spec.scoring_func == "sqrtsoftplus":
        values = sqrtsoftplus(values)
    dtype = dtype if spec.score_dtype == "input" else torch.float32
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).float()
