"""The mathematics of a permutation in plain torch: a stable sort, and sums."""

from __future__ import annotations

import torch

from turnout.contracts import Contract
from turnout.device import SCHEDULE_BLOCK_SIZES
from turnout.routing import reference as routing
from turnout.routing.inputs import RoutingTensors
from turnout.spec import RouterSpec
from turnout.types import Permutation, Routing


def launch(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    num_experts: int,
    contract: Contract,
    permutation: Permutation,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Write the structures whose buffers are there."""
    experts = experts_of(topk_ids, num_experts, expert_map)
    is_expert = experts < num_experts
    sorted_experts, slots = torch.sort(experts, stable=True)
    positions = torch.arange(len(experts), device=experts.device)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    counts = counts.scatter_add_(0, experts, torch.ones_like(experts))[:num_experts]
    offsets = offsets_of(counts)
    is_used = positions < offsets[-1]
    inverse = torch.empty_like(slots).scatter_(0, slots, positions)
    ranks = positions - offsets[sorted_experts]  # of sorted slots inside their experts

    _write(permutation.tokens_per_expert, counts)
    _write(permutation.expert_offsets, offsets)
    _write(permutation.permuted_idx, torch.where(is_used, slots, -1))
    _write(permutation.inv_permuted_idx, torch.where(is_expert, inverse, -1).view(topk_ids.shape))
    if permutation.bitmatrix is not None:
        _write(permutation.bitmatrix, bitmatrix_of(experts.view(topk_ids.shape), num_experts))
    if permutation.permuted_weights is not None:
        assert topk_weights is not None, "permute refuses permuted_weights without weights"
        _write(permutation.permuted_weights, torch.where(is_used, topk_weights.flatten()[slots], 0.0))
    if contract.block_size is not None:
        first = offsets_of(blocks_of(counts, contract.block_size))
        at = first[sorted_experts] * contract.block_size + ranks
        _write_at(permutation.sorted_token_ids, at, slots, is_used, len(experts))
        _write_at(permutation.expert_ids, at // contract.block_size, sorted_experts, is_used, -1)
        _write(permutation.num_tokens_post_padded, first[-1:] * contract.block_size)
    for row, block_size in enumerate(SCHEDULE_BLOCK_SIZES):
        first, blocks = offsets_of(blocks_of(counts, block_size)), ranks // block_size
        if permutation.block_offsets is not None:
            _write(permutation.block_offsets[row], first)
        if permutation.block_schedule is not None:
            entries = blocks << 16 | sorted_experts
            _write_at(permutation.block_schedule[row], first[sorted_experts] + blocks, entries, is_used, -1)


def launch_routed(
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    tensors: RoutingTensors,
    out: Routing,
) -> None:
    """Route, then write the structures."""
    weights, ids, *_ = out
    routing.launch(router_logits, spec, contract, tensors, weights, ids)
    launch(ids, weights, contract.num_ids(spec.num_experts), contract, out.permutation)


def experts_of(topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None = None) -> torch.Tensor:
    """The expert of each slot, through the map if there is one, [T * K] int64; num_experts where there is none.

    There is none for ids outside of the map (or, without one, of the experts), and where the map says no expert.
    """
    ids = topk_ids.flatten().long()
    if expert_map is not None:
        is_mapped = (ids >= 0) & (ids < len(expert_map))
        ids = torch.where(is_mapped, expert_map.long()[ids.where(is_mapped, 0)], -1)
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def offsets_of(counts: torch.Tensor) -> torch.Tensor:
    """[E] counts to [E + 1] offsets, which start with 0 and end with the total."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def blocks_of(counts: torch.Tensor, block_size: int) -> torch.Tensor:
    """Blocks that each expert's slots fill, the last of them perhaps in part."""
    return (counts + block_size - 1) // block_size


def bitmatrix_of(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[T, K] experts to [T, ceil(E / 32)] int64: bit e of a row says whether it chose e; E stands for none."""
    words = -(-num_experts // 32)
    chosen = torch.zeros(len(experts), 32 * words + 1, dtype=torch.int64, device=experts.device)
    chosen = chosen.scatter_(1, torch.where(experts < num_experts, experts, 32 * words), 1)[:, :-1]
    return (chosen.view(-1, words, 32) << torch.arange(32, device=experts.device)).sum(dim=-1)


def _write(buffer: torch.Tensor | None, values: torch.Tensor) -> None:
    if buffer is not None:
        buffer.copy_(values)


def _write_at(
    buffer: torch.Tensor | None, at: torch.Tensor, values: torch.Tensor, is_used: torch.Tensor, otherwise: int
) -> None:
    """Values at their places, ``otherwise`` everywhere else."""
    if buffer is not None:
        room = torch.full((len(buffer) + 1,), otherwise, device=at.device)
        buffer.copy_(room.scatter_(0, torch.where(is_used, at, len(buffer)), values)[:-1])
