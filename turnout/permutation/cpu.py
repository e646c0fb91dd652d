"""Permutation on a CPU: a counting sort, one pass over the slots to count and one to place.

The kernel works on addresses and dtype codes, so that it is compiled once (and cached on disk), and reads and writes
every dtype in place. numba is imported at the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from turnout.contracts import Contract
from turnout.device import SCHEDULE_BLOCK_SIZES
from turnout.routing import cpu as routing
from turnout.routing.inputs import RoutingTensors
from turnout.spec import RouterSpec
from turnout.types import Permutation, Routing

# Codes that the kernel knows dtypes by.
_IDS_CODE = {torch.int16: 0, torch.int32: 1, torch.uint32: 1, torch.int64: 2}


def launch(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    num_experts: int,
    contract: Contract,
    permutation: Permutation,
    expert_map: torch.Tensor | None = None,
) -> int:
    """Write the structures whose buffers are there.

    Returns:
        How many slots have a position.
    """
    if not topk_ids.is_cpu:
        raise ValueError(f"impl='cpu' needs ids on a CPU, got {topk_ids.device}; use impl='triton' or impl='auto'")
    num_tokens, top_k = topk_ids.shape
    expert_ids, schedule = permutation.expert_ids, permutation.block_schedule
    sorted_ids, block_size = permutation.sorted_token_ids, contract.block_size or 1
    blocks = len(expert_ids) if expert_ids is not None else 0
    blocks = len(sorted_ids) // block_size if sorted_ids is not None else blocks
    used: int = _kernel()(
        topk_ids.data_ptr(), _IDS_CODE[topk_ids.dtype],
        _address(expert_map), 0 if expert_map is None else len(expert_map), num_tokens, top_k, num_experts,
        contract.structures_dtype == torch.int64, block_size, blocks,
        len(SCHEDULE_BLOCK_SIZES), SCHEDULE_BLOCK_SIZES[0], 0 if schedule is None else schedule.shape[1],
        _address(topk_weights), contract.weights_dtype.itemsize, *map(_address, permutation),
    )  # fmt: skip
    return used


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


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _kernel() -> Callable[..., Any]:
    from turnout.permutation._cpu_kernel import permute_slots

    return permute_slots
