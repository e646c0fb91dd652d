"""The operators ``turnout::combine`` and ``turnout::combine_out``, as torch's dispatcher and compiler see them."""

from __future__ import annotations

import torch

from turnout.impls import check_apart, launch_of

_INPUTS = "Tensor expert_out, Tensor topk_weights, Tensor? inv_permuted_idx, str impl"
torch.library.define("turnout::combine", f"({_INPUTS}) -> Tensor")
torch.library.define("turnout::combine_out", f"({_INPUTS}, *, Tensor(a!) out) -> ()")
# Nothing here is differentiable, and callers refuse what requires grad: autograd's own fallback is time lost.
for _operator in ("combine", "combine_out"):
    torch.library.impl(f"turnout::{_operator}", "Autograd")(torch.library.fallthrough_kernel)
combine, combine_out = torch.ops.turnout.combine.default, torch.ops.turnout.combine_out.default


@torch.library.impl("turnout::combine", "CompositeExplicitAutograd")
def _combine(
    expert_out: torch.Tensor, topk_weights: torch.Tensor, inv_permuted_idx: torch.Tensor | None, impl: str
) -> torch.Tensor:
    out = _allocate(expert_out, topk_weights)
    launch_of("combine", impl)(expert_out, topk_weights, inv_permuted_idx, out)
    return out


@torch.library.impl("turnout::combine_out", "CompositeExplicitAutograd")
def _combine_out(
    expert_out: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor | None,
    impl: str,
    *,
    out: torch.Tensor,
) -> None:
    check_apart(out, "expert_out", expert_out)
    launch_of("combine", impl)(expert_out, topk_weights, inv_permuted_idx, out)


def _allocate(expert_out: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    num_tokens, hidden_size = topk_weights.shape[0], expert_out.shape[1]
    return torch.empty_strided(
        (num_tokens, hidden_size), (hidden_size, 1), dtype=expert_out.dtype, device=expert_out.device
    )


@torch.library.register_fake("turnout::combine")
def _combine_fake(expert_out: torch.Tensor, topk_weights: torch.Tensor, *_: object) -> torch.Tensor:
    return _allocate(expert_out, topk_weights)


@torch.library.register_fake("turnout::combine_out")
def _combine_out_fake(*_: object, out: torch.Tensor) -> None:
    return None
