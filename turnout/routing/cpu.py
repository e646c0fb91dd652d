"""Routing on a CPU: one pass over each row, threads for many rows.

The kernel works on addresses and dtype codes, so that it is compiled once (and cached on disk), reads 16-bit
floats and writes every dtype in place, and a call makes no arrays. numba is imported at the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from turnout.contracts import Contract
from turnout.routing.inputs import RoutingTensors, refuse_further
from turnout.spec import RouterSpec
from turnout.threads import in_threads

# Rows are shared out among threads from this many logits on: below, waking a thread costs more than it saves.
LOGITS_PER_THREAD = 1 << 15

# Codes that the kernel knows dtypes by.
_FLOAT_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_IDS_CODE = {torch.int16: 0, torch.int32: 1, torch.uint32: 1, torch.int64: 2}


def launch(
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    tensors: RoutingTensors,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    """Route into the two buffers, on as many of torch's threads as the rows are worth."""
    if not router_logits.is_cpu:
        raise ValueError(
            f"impl='cpu' needs logits on a CPU, got {router_logits.device}; use impl='triton' or impl='auto'"
        )
    refuse_further("cpu", spec, tensors)
    per_expert_scale, is_padding, num_valid_tokens, expert_map = tensors[:4]
    num_tokens, num_experts = router_logits.shape
    logits_code = _FLOAT_CODE[router_logits.dtype]
    sentinel = contract.sentinel_id(num_experts)
    arguments = (
        router_logits.data_ptr(), logits_code, router_logits.stride(0), num_experts, spec.top_k,
        spec.renormalize, spec.routed_scaling_factor,
        logits_code if spec.weights_rounding == "input" else 0,
        _address(per_expert_scale), 0 if per_expert_scale is None else _FLOAT_CODE[per_expert_scale.dtype],
        _address(is_padding), _address(num_valid_tokens), 0 if sentinel is None else sentinel,
        _address(expert_map), contract.num_ids(num_experts),
        topk_weights.data_ptr(), _FLOAT_CODE[topk_weights.dtype], topk_ids.data_ptr(), _IDS_CODE[topk_ids.dtype],
    )  # fmt: skip
    threads = min(torch.get_num_threads(), num_tokens * num_experts // LOGITS_PER_THREAD)
    in_threads(functools.partial(_kernel(), *arguments), num_tokens, threads)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _kernel() -> Callable[..., Any]:
    from turnout.routing._cpu_kernel import route_rows

    return route_rows
