"""Routing on a CPU: one pass over each row, threads for many rows.

One kernel routes the plain softmax families, and a second one all others. Both work on addresses and dtype codes, so
that each is compiled once (and cached on disk), and reads and writes every dtype in place. numba is imported at the
first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from turnout.contracts import Contract
from turnout.routing.inputs import RoutingTensors
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
    if _is_plain_softmax(spec) and tensors.are_plain():
        run = _plain_run(router_logits, spec, contract, tensors, topk_weights, topk_ids)
    else:
        run = _family_run(router_logits, spec, contract, tensors, topk_weights, topk_ids)
    threads = min(torch.get_num_threads(), router_logits.numel() // LOGITS_PER_THREAD)
    if tensors.expert_load is not None:  # its counts are not atomic
        threads = 1
    in_threads(run, router_logits.shape[0], threads)


@functools.cache
def _is_plain_softmax(spec: RouterSpec) -> bool:
    """Whether the kernel of the plain softmax families computes all that the spec says."""
    is_plain = spec.scoring_func == "softmax" and spec.weighs_by_shares and spec.num_expert_group == 1
    return is_plain and spec.logit_scale == 1.0 and spec.logit_softcap is None and not spec.divide_by_top_k


def _plain_run(
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    tensors: RoutingTensors,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> Callable[[int, int], Any]:
    per_expert_scale, is_padding, num_valid_tokens, expert_map = tensors[:4]
    num_experts = router_logits.shape[1]
    logits_code = _FLOAT_CODE[router_logits.dtype]
    sentinel = contract.sentinel_id(num_experts)
    return functools.partial(
        _plain_kernel(),
        router_logits.data_ptr(), logits_code, router_logits.stride(0), num_experts, spec.top_k,
        spec.renormalize, spec.routed_scaling_factor,
        logits_code if spec.weights_rounding == "input" else 0,
        _address(per_expert_scale), _float_code(per_expert_scale),
        _address(is_padding), _address(num_valid_tokens), 0 if sentinel is None else sentinel,
        _address(expert_map), contract.num_ids(num_experts),
        topk_weights.data_ptr(), _FLOAT_CODE[topk_weights.dtype], topk_ids.data_ptr(), _IDS_CODE[topk_ids.dtype],
    )  # fmt: skip


def _family_run(
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    tensors: RoutingTensors,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> Callable[[int, int], Any]:
    num_experts = router_logits.shape[1]
    sentinel = contract.sentinel_id(num_experts)
    bias, input_ids, given_ids = tensors.e_score_correction_bias, tensors.input_ids, tensors.given_ids
    to_physical, expert_load = tensors.logical_to_physical_map, tensors.expert_load
    call = np.array((  # in the order of CALL, which the kernel sees it as: numpy takes longer to fill a record
        router_logits.data_ptr(), _FLOAT_CODE[router_logits.dtype], router_logits.stride(0),
        topk_weights.data_ptr(), _FLOAT_CODE[topk_weights.dtype], topk_ids.data_ptr(), _IDS_CODE[topk_ids.dtype],
        0 if sentinel is None else sentinel, contract.num_ids(num_experts),
        _address(tensors.per_expert_scale), _float_code(tensors.per_expert_scale),
        _address(tensors.is_padding), _address(tensors.num_valid_tokens), _address(tensors.expert_map),
        _address(bias), _float_code(bias),
        _address(input_ids), 0 if input_ids is None else _IDS_CODE[input_ids.dtype],
        _address(given_ids), 0 if given_ids is None else _IDS_CODE[given_ids.dtype],
        -1 if given_ids is None else len(given_ids),
        _address(to_physical), 0 if to_physical is None else to_physical.shape[1],
        _address(tensors.logical_replica_count),
        _address(tensors.record_load), _address(tensors.num_counted_tokens),
        _address(expert_load), 0 if expert_load is None else len(expert_load), _address(tensors.replay_ids),
    ), np.int64)  # fmt: skip
    return functools.partial(_family_kernel(), _family(spec, router_logits.dtype), call)


@functools.cache
def _family(spec: RouterSpec, dtype: torch.dtype) -> np.ndarray:
    """What the kernel of all families reads of a spec, for logits of a dtype."""
    from turnout.routing import _cpu_families as kernel

    scoring = {
        "softmax": kernel.SOFTMAX, "sigmoid": kernel.SIGMOID, "sqrtsoftplus": kernel.SQRTSOFTPLUS,
        "none": kernel.NO_SCORE,
    }[spec.scoring_func]  # fmt: skip
    rounds_scores, rounds_weights = spec.score_dtype == "input", spec.weights_rounding == "input"
    return np.array([(
        spec.num_experts, spec.top_k, spec.num_expert_group, spec.topk_group, scoring,
        _FLOAT_CODE[dtype] if rounds_scores else 0, _FLOAT_CODE[dtype] if rounds_weights else 0, spec.ranks_scores,
        spec.group_score == "top2_sum", spec.weighs_by_shares, spec.selected_score == "sigmoid",
        spec.shares_among_selected, spec.renormalize, spec.divide_by_top_k,
        spec.logit_scale, spec.logit_softcap or 0.0, torch.finfo(dtype if rounds_scores else torch.float32).max,
        0.0 if spec.fills_with_zero else -np.inf,
        spec.renormalize_eps, spec.renormalize_min, spec.routed_scaling_factor,
    )], kernel.FAMILY)  # fmt: skip


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float_code(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else _FLOAT_CODE[tensor.dtype]


@functools.cache
def _plain_kernel() -> Callable[..., Any]:
    from turnout.routing._cpu_kernel import route_rows

    return route_rows


@functools.cache
def _family_kernel() -> Callable[..., Any]:
    from turnout.routing._cpu_families import route_rows_of_any_family

    return route_rows_of_any_family
