"""Quantised experts for many tokens: the kernels of ``_triton_quantized`` over blocks of slots that share an expert."""

from __future__ import annotations

import torch

from turnout.experts import _triton_quantized as kernels
from turnout.experts._grouped_blocks import block_map
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing


def launch(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run the experts of many tokens into ``out``: each block of slots reads the weights of its expert.

    The padded block map is taken from ``routing`` if it is there, and written before if not.
    """
    kernels.check_support(hidden_states, spec)
    blocks = block_map(routing, len(weights.down_proj), kernels.TILES)
    kernels.launch_blocks(hidden_states, weights, routing, spec, blocks, out)


def launch_batch_invariant(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """As `launch`, in blocks of one size: tensor cores may sum otherwise in another one."""
    kernels.check_support(hidden_states, spec)
    blocks = block_map(routing, len(weights.down_proj), kernels.TILES, min(kernels.TILES))
    kernels.launch_blocks(hidden_states, weights, routing, spec, blocks, out)
