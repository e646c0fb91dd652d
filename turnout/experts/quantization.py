"""Quantised experts: the form of their weights, and how a scheme rounds weights and activations.

The forms, and every rounding, are those of the compressed-tensors library (0.20: ``compressors/pack_quantized``,
``compressors/naive_quantized``, ``quantization/utils/helpers.py``). All schemes are symmetric: a value is its
quantised number times its scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from turnout.impls import check_kind, check_tensor
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights

INT4_PER_INT32 = 8
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Scheme(NamedTuple):
    """How the weights of a scheme lie in memory, and what its activations are quantised to."""

    weight_dtype: torch.dtype  # of the stored tensor
    weight_bits: int
    activation_dtype: torch.dtype | None  # None: activations are not quantised


SCHEMES = {
    "w4a16": Scheme(torch.int32, 4, None),
    "w4a8_int8": Scheme(torch.int32, 4, torch.int8),
    "w8a8_int8": Scheme(torch.int8, 8, torch.int8),
    "w8a8_fp8": Scheme(torch.float8_e4m3fn, 8, torch.float8_e4m3fn),
}
"""By `turnout.ExpertsSpec.quantization`.

4 bits: weights [E, rows, columns / 8] int32, scales [E, rows, columns / group_size]; column ``8 w + j`` is nibble j of
word w, the lowest first, less 8. 8 bits: weights [E, rows, columns], scales [E, rows, 1].
"""


def check_weights(hidden_states: torch.Tensor, weights: ExpertsWeights, spec: ExpertsSpec) -> None:
    """Refuse weights that are not in the form of the spec's scheme.

    Raises:
        TypeError: a weight is not a tensor.
        ValueError: a shape, dtype or device does not fit, or a bias is given.
        NotImplementedError: the spec asks for a layout that quantised weights do not have.
    """
    for field in ("transposed", "interleaved", "bias"):
        if getattr(spec, field):
            raise NotImplementedError(
                f"experts does not run {field}=True with quantization={spec.quantization!r}: quantised weights are "
                "[E, 2I, H] and [E, H, I], all gate before all up, without bias"
            )
    for name in ("gate_up_bias", "down_bias"):
        if getattr(weights, name) is not None:
            raise ValueError(f"the spec has bias=False, but ExpertsWeights.{name} is given")
    for name in ("gate_up_proj", "down_proj", "gate_up_scale", "down_scale"):
        tensor = getattr(weights, name)
        if tensor is None:
            raise ValueError(f"the spec has quantization={spec.quantization!r}, but ExpertsWeights.{name} is missing")
        check_kind(name, tensor, torch.Tensor)
    if weights.down_proj.dim() != 3:
        raise ValueError(
            f"down_proj must have three dimensions, the experts first; got shape {list(weights.down_proj.shape)}"
        )
    scheme, group = SCHEMES[spec.quantization], spec.group_size
    num_experts, hidden_size = weights.down_proj.shape[0], hidden_states.shape[1]
    intermediate_size = weights.down_proj.shape[2] * (INT4_PER_INT32 if scheme.weight_bits == 4 else 1)
    if group is not None and (group % INT4_PER_INT32 or hidden_size % group or intermediate_size % group):
        raise ValueError(
            f"group_size={group} must be a multiple of 8 that divides the hidden size {hidden_size} and the "
            f"intermediate size {intermediate_size}; quantise with another group size"
        )
    beside = ("hidden_states", hidden_states)
    for name, rows, columns in (
        ("gate_up", 2 * intermediate_size, hidden_size),
        ("down", hidden_size, intermediate_size),
    ):
        stored = columns // INT4_PER_INT32 if scheme.weight_bits == 4 else columns
        groups = 1 if group is None else columns // group
        shape = (num_experts, rows)
        check_tensor(f"{name}_proj", getattr(weights, f"{name}_proj"), (*shape, stored), (scheme.weight_dtype,), beside)
        check_tensor(f"{name}_scale", getattr(weights, f"{name}_scale"), (*shape, groups), SCALE_DTYPES, beside)


def empty_weights(
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    spec: ExpertsSpec,
    *,
    scale_dtype: torch.dtype,
    device: torch.device | str,
) -> ExpertsWeights:
    """Weights in the form of a spec's scheme, not yet written."""
    scheme = SCHEMES[spec.quantization]

    def weight(rows: int, columns: int) -> torch.Tensor:
        stored = columns // INT4_PER_INT32 if scheme.weight_bits == 4 else columns
        return torch.empty(num_experts, rows, stored, dtype=scheme.weight_dtype, device=device)

    def scale(rows: int, columns: int) -> torch.Tensor:
        groups = columns // (spec.group_size or columns)
        return torch.empty(num_experts, rows, groups, dtype=scale_dtype, device=device)

    gate_up, down = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
    return ExpertsWeights(weight(*gate_up), weight(*down), gate_up_scale=scale(*gate_up), down_scale=scale(*down))


def quantize_activations(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row by its largest magnitude.

    Scale and quotient are rounded to the dtype of ``values``, as by the library with ``strategy="token",
    dynamic=True`` (which takes the rows of [T, H] for one token: it wants [1, T, H]).

    Args:
        values: [rows, columns] float32, bfloat16 or float16.
        dtype: int8 or float8_e4m3fn.

    Returns:
        The quantised values [rows, columns], and their scales [rows, 1] in the dtype of ``values``.
    """
    lowest, highest = limits(dtype, 8)
    scale = _nonzero(values.abs().amax(dim=-1, keepdim=True) / ((highest - lowest) / 2))
    return _rounded(values / scale, dtype, 8), scale


def quantize_weights(weights: ExpertsWeights, spec: ExpertsSpec) -> ExpertsWeights:
    """Plain weights [E, 2I, H] and [E, H, I] in the form of a spec's scheme; scales are of the weights' dtype.

    As the library with a min-max observer. Calibrated checkpoints come from elsewhere; this makes weights for tests
    and benchmarks.
    """
    gate_up_proj, gate_up_scale = _quantize_weight(weights.gate_up_proj, spec)
    down_proj, down_scale = _quantize_weight(weights.down_proj, spec)
    return ExpertsWeights(gate_up_proj, down_proj, gate_up_scale=gate_up_scale, down_scale=down_scale)


def dequantized(weight: torch.Tensor, scale: torch.Tensor, spec: ExpertsSpec) -> torch.Tensor:
    """The values [..., rows, columns] of a quantised weight, in float32, exactly."""
    values = unpack_int4(weight) if SCHEMES[spec.quantization].weight_bits == 4 else weight
    groups: torch.Tensor = values.float().unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.float()[..., None]).flatten(-2)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """int8 values in [-8, 7], [..., columns], as int32 words [..., columns / 8]."""
    nibbles = (values.view(torch.uint8) + 8) & 15
    bytes_ = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return bytes_.view(torch.int32)


def unpack_int4(words: torch.Tensor) -> torch.Tensor:
    """int32 words [..., columns / 8] as int8 values in [-8, 7], [..., columns]."""
    bytes_ = words.view(torch.uint8)
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(-2).view(torch.int8) - 8


def _quantize_weight(weight: torch.Tensor, spec: ExpertsSpec) -> tuple[torch.Tensor, torch.Tensor]:
    scheme = SCHEMES[spec.quantization]
    stored = torch.int8 if scheme.weight_bits == 4 else scheme.weight_dtype
    lowest, highest = limits(stored, scheme.weight_bits)
    groups = weight.unflatten(-1, (-1, spec.group_size or weight.shape[-1]))
    scale = _nonzero(groups.abs().amax(dim=-1, keepdim=True) / ((highest - lowest) / 2))
    values = _rounded(groups / scale, stored, scheme.weight_bits).flatten(-2)
    return pack_int4(values) if scheme.weight_bits == 4 else values, scale.squeeze(-1)


def limits(dtype: torch.dtype, bits: int) -> tuple[float, float]:
    """The lowest and the highest number of so many bits; those of float8 are in its dtype."""
    if dtype.is_floating_point:
        return torch.finfo(dtype).min, torch.finfo(dtype).max
    return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """Scales by which one can divide: the dtype's epsilon for rows and groups of zeros."""
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def _rounded(values: torch.Tensor, dtype: torch.dtype, bits: int) -> torch.Tensor:
    values = values.clamp(*limits(dtype, bits))
    return values.to(dtype) if dtype.is_floating_point else values.round().to(dtype)
