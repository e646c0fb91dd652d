"""Routing as one Triton launch, for CUDA, ROCm and XPU devices."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from turnout.contracts import Contract
from turnout.device import MAX_KERNEL_EXPERTS
from turnout.device.launch import are_of_usual_size, current_stream, launch_compiled, on_device_of, refuse_cpu
from turnout.device.routing import Recipe, route_rows
from turnout.device.scores import EXACT
from turnout.routing.inputs import RoutingTensors
from turnout.spec import RouterSpec


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr,  # [T, E], rows row_stride apart
    scale_ptr,  # the fields of RoutingTensors, in their order; absent ones are None
    is_padding_ptr,
    num_valid_ptr,
    expert_map_ptr,
    bias_ptr,
    input_ids_ptr,
    given_ids_ptr,
    physical_map_ptr,
    replica_count_ptr,
    record_load_ptr,
    num_counted_ptr,
    load_ptr,
    replay_ptr,
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K]
    num_tokens,
    row_stride,
    RECIPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (ceil(T / BLOCK_T),). Each program routes BLOCK_T rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    route_rows(
        logits_ptr, scale_ptr, is_padding_ptr, num_valid_ptr, expert_map_ptr, bias_ptr, input_ids_ptr, given_ids_ptr,
        physical_map_ptr, replica_count_ptr, record_load_ptr, num_counted_ptr, load_ptr, replay_ptr, weights_ptr,
        ids_ptr, rows, num_tokens, row_stride, RECIPE, BLOCK_T, BLOCK_E, BLOCK_K,
    )  # fmt: skip


class Tile(NamedTuple):
    """Rows of one program, and the warps that share them."""

    rows: int
    num_warps: int


def choose_tile(num_tokens: int, block_e: int) -> Tile:
    """The fastest tile on an H200 (benchmarks/results): one row a program while programs are few or rows long."""
    if num_tokens <= 2048 or block_e > 128:
        return _ONE_ROW
    return Tile(512 // block_e, 1)


_ONE_ROW = Tile(1, 1)
_next_power_of_2 = functools.cache(triton.next_power_of_2)
_NOTHING = (None,) * (len(RoutingTensors._fields) - 4), 0, None
# Kernels with their constant arguments, by all that they are specialised on: Triton's own look-up takes longer.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    tensors: RoutingTensors,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    """Route into the two buffers with one launch, on the device of the logits.

    A kernel seen before is launched on bare addresses, the cheapest way.
    """
    scale, is_padding, num_valid, expert_map = tensors[:4]
    num_tokens = router_logits.shape[0]
    row_stride = spec.num_experts if router_logits.is_contiguous() else router_logits.stride(0)
    tile = choose_tile(num_tokens, _next_power_of_2(spec.num_experts))
    grid = (-(-num_tokens // tile.rows), 1, 1)
    logits_at, weights_at, ids_at = router_logits.data_ptr(), topk_weights.data_ptr(), topk_ids.data_ptr()
    scale_at = None if scale is None else scale.data_ptr()
    padding_at = None if is_padding is None else is_padding.data_ptr()
    valid_at = None if num_valid is None else num_valid.data_ptr()
    map_at = None if expert_map is None else expert_map.data_ptr()
    further_at, further_bits, further_kinds = _NOTHING if tensors.are_plain() else _described(tensors)
    # Triton specialises on pointers that are multiples of 16; torch allocates no others, a view may be one.
    optional = (scale_at or 0) | (padding_at or 0) | (valid_at or 0) | (map_at or 0) | further_bits
    remainder = (logits_at | weights_at | ids_at | optional) % 16
    specialization = (
        spec.key, contract.key, tile, row_stride, router_logits.get_device(), router_logits.dtype, further_kinds,
        None if scale is None else scale.dtype, padding_at is None, valid_at is None, map_at is None, remainder,
    )  # fmt: skip
    known = _compiled.get(specialization)
    if num_tokens == 0:
        check_support(router_logits, spec.num_experts)
        return
    with on_device_of(router_logits):
        arguments = (router_logits, *tensors, topk_weights, topk_ids)
        if known is not None and are_of_usual_size(arguments):
            kernel, constants = known
            addresses = (logits_at, scale_at, padding_at, valid_at, map_at, *further_at, weights_at, ids_at)
            stream = current_stream(router_logits.get_device())
            launch_compiled(kernel, grid, stream, (*addresses, num_tokens, row_stride, *constants))
            return
        check_support(router_logits, spec.num_experts)
        constants = constants_of(spec, contract, tensors, tile)
        kernel = _route_kernel[grid](*arguments, num_tokens, row_stride, *constants, num_warps=tile.num_warps, **EXACT)
        if remainder == 0 and kernel is not None and are_of_usual_size(arguments):  # the interpreter returns nothing
            _compiled[specialization] = kernel, constants


def _described(tensors: RoutingTensors) -> tuple[tuple[int | None, ...], int, tuple[object, ...]]:
    """Of the tensors that most routers lack: addresses, the bits that any has, and what a kernel is compiled for."""
    addresses = tuple([None if tensor is None else tensor.data_ptr() for tensor in tensors[4:]])
    bits = functools.reduce(operator.or_, [address or 0 for address in addresses])
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[4:]]
    return addresses, bits, (*dtypes, *_sizes_of(tensors))


def constants_of(spec: RouterSpec, contract: Contract, tensors: RoutingTensors, tile: Tile) -> tuple[Any, ...]:
    """The constexpr arguments of `_route_kernel`, in its order."""
    recipe = recipe_of(spec, contract, *_sizes_of(tensors))
    return recipe, tile.rows, _next_power_of_2(spec.num_experts), _next_power_of_2(spec.top_k)


def _sizes_of(tensors: RoutingTensors) -> tuple[int, int, int]:
    """Token ids in the table, replicas of an expert, physical experts; 0 where there are none."""
    table = None if tensors.input_ids is None else tensors.given_ids
    physical_map, load = tensors.logical_to_physical_map, tensors.expert_load
    return (
        0 if table is None else table.shape[0],
        0 if physical_map is None else physical_map.shape[1],
        0 if load is None else load.shape[0],
    )


@functools.cache
def recipe_of(
    spec: RouterSpec, contract: Contract, num_token_ids: int, num_replicas: int, num_physical_experts: int
) -> Recipe:
    """What the kernels compute for spec and contract, and tensors of these sizes."""
    sentinel = contract.sentinel_id(spec.num_experts)
    return Recipe(
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        logit_scale=spec.logit_scale,
        logit_softcap=spec.logit_softcap,
        scoring_func=spec.scoring_func,
        rounds_scores=spec.score_dtype == "input",
        ranks_scores=spec.ranks_scores,
        num_expert_group=spec.num_expert_group,
        topk_group=spec.topk_group,
        group_score=spec.group_score,
        fills_with_zero=spec.fills_with_zero,
        weighs_by_shares=spec.weighs_by_shares,
        selected_score=spec.selected_score,
        shares_among_selected=spec.shares_among_selected,
        renormalize=spec.renormalize,
        renormalize_eps=spec.renormalize_eps,
        renormalize_min=spec.renormalize_min,
        routed_scaling_factor=spec.routed_scaling_factor,
        divide_by_top_k=spec.divide_by_top_k,
        rounds_weights=spec.weights_rounding == "input",
        sentinel=0 if sentinel is None else sentinel,
        num_ids=contract.num_ids(spec.num_experts),
        num_token_ids=num_token_ids,
        num_replicas=num_replicas,
        num_physical_experts=num_physical_experts,
    )


def check_support(router_logits: torch.Tensor, num_experts: int) -> None:
    """Refuse logits that the kernel cannot route."""
    refuse_cpu(_route_kernel, router_logits, "logits")
    if num_experts > MAX_KERNEL_EXPERTS:
        raise ValueError(
            f"impl='triton' routes among at most {MAX_KERNEL_EXPERTS} experts, got {num_experts}; use impl='reference'"
        )
