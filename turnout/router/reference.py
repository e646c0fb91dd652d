"""The router in plain torch, rounded where the model rounds; its GEMM is torch's, the fastest for many tokens."""

from __future__ import annotations

import torch

from turnout.spec import RouterSpec
from turnout.types import RouterWeights


def project_reference(hidden_states: torch.Tensor, router: RouterWeights, spec: RouterSpec) -> torch.Tensor:
    """Norm and scale, if the router has one, and the projection."""
    if router.scale is not None:
        hidden_states = _rms_scaled(hidden_states, router.scale, spec.input_norm_eps)
    if spec.projection_dtype == "float32":
        bias = None if router.bias is None else router.bias.float()
        return torch.nn.functional.linear(hidden_states.float(), router.proj.float(), bias)
    return torch.nn.functional.linear(hidden_states, router.proj, router.bias)


def _rms_scaled(hidden_states: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Source: ``Gemma4TextRouter`` in transformers 5.23."""
    values = hidden_states.float()
    values = values * torch.pow(values.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    root_size: float = hidden_states.shape[1] ** -0.5
    return values.to(hidden_states.dtype) * scale * root_size
