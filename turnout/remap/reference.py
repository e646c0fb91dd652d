"""The mathematics in plain torch: what every kernel of this room is compared with."""

from __future__ import annotations

import torch

from turnout.contracts import Contract
from turnout.experts import reference as station
from turnout.permutation import reference as permutation
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Permutation


def launch(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    hidden_states_scales: torch.Tensor | None,
    rows: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """Remap integers into the buffers; the rows of skipped slots come last, as zeros."""
    num_experts, top_k = len(tokens_per_expert), topk_ids.shape[1]
    slot_at = torch.empty(topk_ids.numel(), dtype=torch.int64, device=topk_ids.device)
    written = Permutation(
        tokens_per_expert=tokens_per_expert, permuted_idx=slot_at, inv_permuted_idx=inv_permuted_idx
    )  # fmt: skip
    permutation.launch(topk_ids, None, num_experts, Contract(), written, expert_map)
    is_skipped = (slot_at < 0)[:, None]
    for source, target in ((hidden_states, rows), (hidden_states_scales, scales)):
        if source is not None and target is not None:
            target.copy_(source[slot_at.clamp(min=0) // top_k].masked_fill(is_skipped, 0))


def launch_experts(
    rows: torch.Tensor, tokens_per_expert: torch.Tensor, weights: ExpertsWeights, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run one expert after the other on its rows, into ``out``. (Waits for the device.)."""
    start = 0
    for expert, count in enumerate(tokens_per_expert.tolist()):
        out[start : start + count] = station.expert_reference(rows[start : start + count], weights, expert, spec)
        start += count
