"""Remap on a CPU: two passes over the slots, then torch's copy of rows, on its threads."""

from __future__ import annotations

import functools
import types

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
    token_at = torch.empty(topk_ids.numel(), dtype=torch.int32)  # first the slot at each position
    written = Permutation(
        tokens_per_expert=tokens_per_expert, permuted_idx=token_at, inv_permuted_idx=inv_permuted_idx
    )  # fmt: skip
    used = permutation.launch(topk_ids, None, len(tokens_per_expert), Contract(), written, expert_map)
    _kernels().name_tokens(token_at.data_ptr(), used, topk_ids.shape[1])
    for source, target in ((hidden_states, rows), (hidden_states_scales, scales)):
        if source is not None and target is not None:
            torch.index_select(source, 0, token_at[:used], out=target[:used])
            target[used:].zero_()


def launch_experts(
    rows: torch.Tensor, tokens_per_expert: torch.Tensor, weights: ExpertsWeights, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run each expert on its rows, into ``out``: rows are tokens that chose one expert, with a weight of 1."""
    _check_support(rows)
    num_rows = len(rows)
    topk_ids = torch.empty(num_rows, 1, dtype=torch.int32)
    _kernels().name_experts(tokens_per_expert.data_ptr(), len(tokens_per_expert), topk_ids.data_ptr(), num_rows)
    experts.launch(rows, weights, Routing(torch.ones(num_rows, 1), topk_ids), spec, out)


def _check_support(tensor: torch.Tensor) -> None:
    if not tensor.is_cpu:
        raise ValueError(f"impl='cpu' needs tensors on a CPU, got {tensor.device}; use impl='triton' or impl='auto'")


@functools.cache
def _kernels() -> types.ModuleType:
    from turnout.remap import _cpu_kernel

    return _cpu_kernel
