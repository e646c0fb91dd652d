"""Quantised experts for many tokens: the kernels of ``_triton_quantized`` over blocks of slots that share an expert."""

from __future__ import annotations

import functools

import torch

from turnout.contracts import PADDED_BLOCK_MAP, Contract
from turnout.experts import _triton_quantized as kernels
from turnout.experts.tuning import block_size
from turnout.permutation import ops as permutation
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Permutation, Routing


def launch(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run the experts of many tokens into ``out``: each block of slots reads the weights of its expert.

    The padded block map is taken from ``routing`` if it is there, and written before if not.
    """
    kernels.check_support(hidden_states, spec)
    blocks, num_experts = routing.permutation, len(weights.down_proj)
    if not _is_usable(blocks):
        blocks = _block_map(routing.topk_ids, num_experts, block_size(routing.topk_ids.numel(), num_experts))
    kernels.launch_blocks(hidden_states, weights, routing, spec, blocks, out)


def launch_batch_invariant(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """As `launch`, in blocks of one size: tensor cores may sum otherwise in another one."""
    kernels.check_support(hidden_states, spec)
    blocks = _block_map(routing.topk_ids, len(weights.down_proj), min(kernels.TILES))
    kernels.launch_blocks(hidden_states, weights, routing, spec, blocks, out)


def _is_usable(blocks: Permutation) -> bool:
    """Whether the map is whole, and of blocks that there is a tile for."""
    sorted_token_ids, expert_ids = blocks.sorted_token_ids, blocks.expert_ids
    if sorted_token_ids is None or expert_ids is None or blocks.num_tokens_post_padded is None:
        return False
    return len(expert_ids) > 0 and len(sorted_token_ids) // len(expert_ids) in kernels.TILES


def _block_map(topk_ids: torch.Tensor, num_experts: int, slots: int) -> Permutation:
    contract = _contract(slots)
    buffers = permutation.permute(topk_ids, None, num_experts, contract.key, "triton")
    return permutation.permutation_of(buffers, contract)


@functools.cache
def _contract(slots: int) -> Contract:
    return Contract(structures=PADDED_BLOCK_MAP, block_size=slots)
