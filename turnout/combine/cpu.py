"""Combine on a CPU: one pass over each row."""

from __future__ import annotations

import torch


def launch(
    expert_out: torch.Tensor, topk_weights: torch.Tensor, inv_permuted_idx: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Combine ``expert_out`` [rows, H] into ``out`` [T, H]."""
    from turnout.combine import reference

    reference.launch(expert_out, topk_weights, inv_permuted_idx, out)
