"""The mathematics of combine in plain torch: short, slow, and what every kernel is compared with."""

from __future__ import annotations

import torch


def launch(
    expert_out: torch.Tensor, topk_weights: torch.Tensor, inv_permuted_idx: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Combine ``expert_out`` [rows, H] into ``out`` [T, H]; one term of the sum at a time."""
    num_tokens, top_k = topk_weights.shape
    if expert_out.shape[0] == 0:  # nothing to index
        out.zero_()
        return
    weights = topk_weights.float()
    if inv_permuted_idx is None:
        row_of_slot = torch.arange(num_tokens * top_k, device=out.device).view(num_tokens, top_k)
    else:
        row_of_slot = inv_permuted_idx.long()
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for k in range(top_k):
        is_slot = (row_of_slot[:, k] >= 0) & (weights[:, k] != 0)
        rows = expert_out[row_of_slot[:, k].clamp(min=0)].float()
        total += torch.where(is_slot[:, None], weights[:, k, None] * rows, 0.0)
    out.copy_(total)
