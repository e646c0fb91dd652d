"""The experts' activation, between the two GEMMs."""

import triton
import triton.language as tl


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr):
    """``activation(gate) * (up + UP_OFFSET)`` in float32; the fields of `turnout.ExpertsSpec` of these names."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    if ACTIVATION == "silu":
        gate = gate * _sigmoid(ALPHA * gate)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3)
        gate = gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return gate * (up + UP_OFFSET)


@triton.jit
def _sigmoid(values):
    # Rounded to nearest: a plain division is off by two units, which float32 shows.
    return tl.div_rn(tl.full(values.shape, 1.0, tl.float32), 1.0 + tl.exp(-values))
