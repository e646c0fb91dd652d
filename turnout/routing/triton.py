"""Routing as one Triton launch, for CUDA, ROCm and XPU devices."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from turnout.contracts import Contract
from turnout.device import MAX_KERNEL_EXPERTS
from turnout.device.launch import are_of_usual_size, current_stream, launch_compiled, on_device_of
from turnout.device.routing import route_rows
from turnout.routing.inputs import RoutingTensors, refuse_further
from turnout.spec import RouterSpec

_TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr,  # [T, E], rows row_stride apart
    scale_ptr,  # [E] or None
    is_padding_ptr,  # [T] or None
    num_valid_ptr,  # [1] or None
    expert_map_ptr,  # [E] or None
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K]
    num_tokens,
    row_stride,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALING_FACTOR: tl.constexpr,
    ROUNDING: tl.constexpr,
    SENTINEL: tl.constexpr,
    NUM_IDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (ceil(T / BLOCK_T),). Each program routes BLOCK_T rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    route_rows(
        logits_ptr, scale_ptr, is_padding_ptr, num_valid_ptr, expert_map_ptr, weights_ptr, ids_ptr, rows, num_tokens,
        row_stride, NUM_EXPERTS, TOP_K, RENORMALIZE, SCALING_FACTOR, ROUNDING, SENTINEL, NUM_IDS, BLOCK_T, BLOCK_E,
        BLOCK_K,
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
    refuse_further("triton", spec, tensors)
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
    # Triton specialises on pointers that are multiples of 16; torch allocates no others, a view may be one.
    optional = (scale_at or 0) | (padding_at or 0) | (valid_at or 0) | (map_at or 0)
    remainder = (logits_at | weights_at | ids_at | optional) % 16
    specialization = (
        spec.key, contract.key, tile, row_stride, router_logits.get_device(), router_logits.dtype,
        None if scale is None else scale.dtype, padding_at is None, valid_at is None, map_at is None, remainder,
    )  # fmt: skip
    known = _compiled.get(specialization)
    if num_tokens == 0:
        check_support(router_logits, spec.num_experts)
        return
    with on_device_of(router_logits):
        arguments = (router_logits, *tensors[:4], topk_weights, topk_ids)
        if known is not None and are_of_usual_size(arguments):
            kernel, constants = known
            addresses = (logits_at, scale_at, padding_at, valid_at, map_at, weights_at, ids_at)
            stream = current_stream(router_logits.get_device())
            launch_compiled(kernel, grid, stream, (*addresses, num_tokens, row_stride, *constants))
            return
        check_support(router_logits, spec.num_experts)
        constants = constants_of(router_logits.dtype, spec, contract, tile)
        kernel = _route_kernel[grid](*arguments, num_tokens, row_stride, *constants, num_warps=tile.num_warps)
        if remainder == 0 and kernel is not None and are_of_usual_size(arguments):  # the interpreter returns nothing
            _compiled[specialization] = kernel, constants


def constants_of(logits_dtype: torch.dtype, spec: RouterSpec, contract: Contract, tile: Tile) -> tuple[Any, ...]:
    """The constexpr arguments of `_route_kernel`, in its order."""
    return (
        spec.num_experts,
        spec.top_k,
        spec.renormalize,
        spec.routed_scaling_factor,
        _TL_DTYPE[logits_dtype if spec.weights_rounding == "input" else torch.float32],
        contract.sentinel_id(spec.num_experts),
        contract.num_ids(spec.num_experts),
        tile.rows,
        _next_power_of_2(spec.num_experts),
        _next_power_of_2(spec.top_k),
    )


def check_support(router_logits: torch.Tensor, num_experts: int) -> None:
    """Refuse logits that the kernel cannot route."""
    if router_logits.is_cpu and isinstance(_route_kernel, triton.JITFunction):
        raise ValueError(
            "impl='triton' needs logits on a GPU, got a CPU tensor; use impl='cpu', or set TRITON_INTERPRET=1 "
            "before the first call to run the kernel in Triton's interpreter"
        )
    if num_experts > MAX_KERNEL_EXPERTS:
        raise ValueError(
            f"impl='triton' routes among at most {MAX_KERNEL_EXPERTS} experts, got {num_experts}; use impl='reference'"
        )
