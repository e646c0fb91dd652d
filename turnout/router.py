"""The first station: hidden states [T, H] to router_logits [T, E], in plain torch and the model's own rounding."""

from __future__ import annotations

import torch

from turnout.impls import check_kind, check_tensor
from turnout.spec import RouterSpec
from turnout.types import RouterWeights


def project(hidden_states: torch.Tensor, router: RouterWeights, spec: RouterSpec) -> torch.Tensor:
    """Norm, scale and projection of a router, each rounded where the spec says that the model rounds.

    Source of the norm: ``Gemma4TextRouter`` in transformers 5.23.

    Args:
        hidden_states: [T, H] float32, bfloat16 or float16.
        router: the parameters that the spec names.
        spec: ``input_norm``, ``input_norm_eps``, ``projection_dtype`` and ``router_bias`` are read.

    Returns:
        [T, E], of the dtype of ``hidden_states``, or float32 where the spec projects in float32.

    Raises:
        ValueError: a parameter is missing, not named by the spec, or does not fit.
        TypeError: an argument is not of its type.
    """
    check_kind("router", router, RouterWeights)
    check_kind("spec", spec, RouterSpec)
    check_kind("hidden_states", hidden_states, torch.Tensor)
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states must be [T, H], got shape {list(hidden_states.shape)}")
    _check_router(hidden_states, router, spec)
    if router.scale is not None:
        hidden_states = _rms_scaled(hidden_states, router.scale, spec.input_norm_eps)
    if spec.projection_dtype == "float32":
        bias = None if router.bias is None else router.bias.float()
        return torch.nn.functional.linear(hidden_states.float(), router.proj.float(), bias)
    return torch.nn.functional.linear(hidden_states, router.proj, router.bias)


def _rms_scaled(hidden_states: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    values = hidden_states.float()
    values = values * torch.pow(values.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    root_size: float = hidden_states.shape[1] ** -0.5
    return values.to(hidden_states.dtype) * scale * root_size


def _check_router(hidden_states: torch.Tensor, router: RouterWeights, spec: RouterSpec) -> None:
    num_experts, hidden_size = spec.num_experts + spec.num_shared_columns, hidden_states.shape[1]
    dtypes, beside = (hidden_states.dtype,), ("hidden_states", hidden_states)
    check_tensor("router.proj", router.proj, (num_experts, hidden_size), dtypes, beside)
    for name, wanted, field, size in (
        ("bias", spec.router_bias, f"router_bias={spec.router_bias}", num_experts),
        ("scale", spec.input_norm == "rms_scale", f"input_norm={spec.input_norm!r}", hidden_size),
    ):
        tensor = getattr(router, name)
        if (tensor is not None) != wanted:
            given = "missing" if tensor is None else "given"
            raise ValueError(f"the spec has {field}, but RouterWeights.{name} is {given}")
        if tensor is not None:
            check_tensor(f"router.{name}", tensor, (size,), dtypes, beside)
