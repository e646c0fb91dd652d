"""The operators ``turnout::combine`` and ``turnout::combine_out``, as torch's dispatcher and compiler see them."""

from __future__ import annotations

import torch

from turnout.impls import check_apart, launch_of
from turnout.operators import operator

_INPUTS = "Tensor expert_out, Tensor topk_weights, Tensor? inv_permuted_idx, str impl"


def _allocate(expert_out: torch.Tensor, topk_weights: torch.Tensor, *_: object) -> torch.Tensor:
    num_tokens, hidden_size = topk_weights.shape[0], expert_out.shape[1]
    return torch.empty_strided(
        (num_tokens, hidden_size), (hidden_size, 1), dtype=expert_out.dtype, device=expert_out.device
    )


@operator(f"turnout::combine({_INPUTS}) -> Tensor", _allocate)
def combine(
    expert_out: torch.Tensor, topk_weights: torch.Tensor, inv_permuted_idx: torch.Tensor | None, impl: str
) -> torch.Tensor:
    """The sum in a new buffer."""
    out = _allocate(expert_out, topk_weights)
    launch_of("combine", impl)(expert_out, topk_weights, inv_permuted_idx, out)
    return out


@operator(f"turnout::combine_out({_INPUTS}, *, Tensor(a!) out) -> ()", lambda *_, out: None)
def combine_out(
    expert_out: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor | None,
    impl: str,
    *,
    out: torch.Tensor,
) -> None:
    """The sum in the buffer given."""
    check_apart(out, "expert_out", expert_out)
    launch_of("combine", impl)(expert_out, topk_weights, inv_permuted_idx, out)
