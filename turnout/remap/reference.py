"""The mathematics in plain torch: what every kernel of this room is compared with."""

from __future__ import annotations

import torch

from turnout.contracts import Contract
from turnout.experts import reference as station
from turnout.permutation import reference as permutation
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Permutation


def local_ids(topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None) -> torch.Tensor:
    """The local expert of each slot, [T * K] int64; num_experts where the slot is skipped.

    Skipped are ids outside of the map (or, without one, of the experts), and ids that it does not map to an expert.
    """
    ids = topk_ids.flatten().long()
    if expert_map is not None:
        is_mapped = (ids >= 0) & (ids < len(expert_map))
        ids = torch.where(is_mapped, expert_map.long()[ids.where(is_mapped, 0)], -1)
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


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
    experts = local_ids(topk_ids, num_experts, expert_map)
    written = Permutation(tokens_per_expert=tokens_per_expert, inv_permuted_idx=inv_permuted_idx)
    permutation.launch(experts.view_as(topk_ids), None, num_experts, Contract(), written)
    slot_at = torch.sort(experts, stable=True).indices
    is_skipped = (experts[slot_at] == num_experts)[:, None]
    for source, target in ((hidden_states, rows), (hidden_states_scales, scales)):
        if source is not None and target is not None:
            target.copy_(source[slot_at // top_k].masked_fill(is_skipped, 0))


def launch_experts(
    rows: torch.Tensor, tokens_per_expert: torch.Tensor, weights: ExpertsWeights, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run one expert after the other on its rows, into ``out``. (Waits for the device.)."""
    start = 0
    for expert, count in enumerate(tokens_per_expert.tolist()):
        out[start : start + count] = station.expert_reference(rows[start : start + count], weights, expert, spec)
        start += count
