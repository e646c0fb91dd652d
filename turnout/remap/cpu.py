"""Remap on a CPU: the permutation's passes over the slots, then torch's copy of rows, on its threads."""

from __future__ import annotations

import torch

from turnout.contracts import Contract
from turnout.experts import cpu as experts
from turnout.permutation import cpu as permutation
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Permutation, Routing


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
    """Remap integers into the buffers."""
    _check_support(hidden_states)
    ids = topk_ids if expert_map is None else _local_ids(topk_ids, expert_map)
    permuted_idx = torch.empty(topk_ids.numel(), dtype=torch.int32)
    written = Permutation(
        tokens_per_expert=tokens_per_expert, permuted_idx=permuted_idx, inv_permuted_idx=inv_permuted_idx
    )
    permutation.launch(ids, None, len(tokens_per_expert), Contract(), written)
    used = int(tokens_per_expert.sum())
    token_at = permuted_idx[:used] // topk_ids.shape[1]
    for source, target in ((hidden_states, rows), (hidden_states_scales, scales)):
        if source is not None and target is not None:
            torch.index_select(source, 0, token_at, out=target[:used])
            target[used:].zero_()


def _local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """The map's entry for each slot; -1 where there is none."""
    is_mapped = (topk_ids >= 0) & (topk_ids < len(expert_map))
    inside = topk_ids.where(is_mapped, 0).flatten()
    return torch.index_select(expert_map, 0, inside).view(topk_ids.shape).where(is_mapped, -1)


def launch_experts(
    rows: torch.Tensor, tokens_per_expert: torch.Tensor, weights: ExpertsWeights, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run each expert on its rows, into ``out``: rows are tokens that chose one expert, with a weight of 1."""
    _check_support(rows)
    expert_of_row = torch.repeat_interleave(tokens_per_expert)
    unused = len(rows) - len(expert_of_row)
    topk_ids = torch.nn.functional.pad(expert_of_row, (0, unused), value=-1)[:, None]
    experts.launch(rows, weights, Routing(torch.ones(topk_ids.shape), topk_ids), spec, out)


def _check_support(tensor: torch.Tensor) -> None:
    if not tensor.is_cpu:
        raise ValueError(f"impl='cpu' needs tensors on a CPU, got {tensor.device}; use impl='triton' or impl='auto'")
