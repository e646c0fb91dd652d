"""The operator ``turnout::project``, as torch's dispatcher, compiler and export see it."""

from __future__ import annotations

import torch

from turnout.impls import launch_of
from turnout.operators import operator

_INPUTS = "Tensor hidden_states, Tensor proj, Tensor? bias, Tensor? scale, float eps, bool in_float32"


def _allocate(hidden_states: torch.Tensor, proj: torch.Tensor, *further: object) -> torch.Tensor:
    size = hidden_states.shape[0], proj.shape[0]
    dtype = torch.float32 if further[-1] else hidden_states.dtype
    return torch.empty_strided(size, (size[1], 1), dtype=dtype, device=hidden_states.device)


@operator(f"turnout::project({_INPUTS}) -> Tensor", _allocate)
def project(
    hidden_states: torch.Tensor,
    proj: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    in_float32: bool,
) -> torch.Tensor:
    """Router logits with one launch."""
    logits = _allocate(hidden_states, proj, in_float32)
    launch_of("router", "triton")(hidden_states, proj, bias, scale, eps, logits)
    return logits
