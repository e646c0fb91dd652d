"""Routing as one Triton launch, for CUDA, ROCm and XPU devices."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from turnout.contracts import Contract
from turnout.device import MAX_KERNEL_EXPERTS
from turnout.device.keys import TAKEN, column_of, key_value, ordered_key, with_column, without_column
from turnout.device.rounding import narrowed, round_to, widened
from turnout.device.softmax import tree_sum, unnormalized_softmax
from turnout.spec import RouterSpec

_TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr,  # [T, E], rows row_stride apart
    scale_ptr,  # [E] or None
    is_padding_ptr,  # [T] or None
    num_valid_ptr,  # [1] or None
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K]
    num_tokens,
    row_stride,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALING_FACTOR: tl.constexpr,
    ROUNDING: tl.constexpr,  # dtype to which the model rounds its weights
    SENTINEL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (ceil(T / BLOCK_T),). Each program routes BLOCK_T rows, held whole.

    K rounds take the largest key and, among equals, the lowest column.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_E)[None, :]
    is_row = rows < num_tokens
    is_expert = columns < NUM_EXPERTS
    # Lanes take columns one by one, not in runs: the tile then has the layout of the results, and nothing is
    # exchanged through shared memory (fewer instructions a row by 39% at E=128, K=8).
    logit_ptrs = tl.max_contiguous(logits_ptr + rows[:, None] * row_stride + columns, [1, 1])
    logits = widened(tl.load(logit_ptrs, mask=is_row[:, None] & is_expert, other=0.0))

    # A 16-bit logit and its column fit one key, which then is unique in its row.
    UNIQUE: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth == 16
    keys = ordered_key(logits)
    if not RENORMALIZE:
        values = key_value(keys)
    if UNIQUE:
        keys = with_column(keys, columns)
    keys = tl.where(is_expert, keys, TAKEN)
    slots = tl.arange(0, BLOCK_K)[None, :]
    topk_keys = tl.full([BLOCK_T, BLOCK_K], 0, tl.int32)
    topk_ids = tl.full([BLOCK_T, BLOCK_K], 0, tl.int32)
    for k in tl.static_range(TOP_K):
        top_key = tl.max(keys, axis=1)[:, None]
        topk_keys = tl.where(slots == k, top_key, topk_keys)
        taken = keys == top_key
        if not UNIQUE:
            lowest = tl.min(tl.where(taken, columns, BLOCK_E), axis=1)[:, None]
            topk_ids = tl.where(slots == k, lowest, topk_ids)
            taken = columns == lowest
        if k == 0:
            best = top_key
        keys = tl.where(taken, TAKEN, keys)

    if UNIQUE:
        topk_ids = column_of(topk_keys)
        topk_keys = without_column(topk_keys)
        best = without_column(best)
    best = key_value(best)
    is_slot = slots < TOP_K
    mass = tl.where(is_slot, unnormalized_softmax(key_value(topk_keys), best), 0.0)
    if RENORMALIZE:
        total = tree_sum(mass, BLOCK_T, BLOCK_K)
    else:
        everyone = unnormalized_softmax(values, best)
        total = tree_sum(tl.where(is_expert, everyone, 0.0), BLOCK_T, BLOCK_E)
        total = tl.where(best == float("-inf"), TOP_K, total)  # nothing but -inf: K equal shares
    weights = tl.div_rn(mass, tl.broadcast_to(total, [BLOCK_T, BLOCK_K]))
    if scale_ptr is not None:
        weights = weights * widened(tl.load(scale_ptr + topk_ids, mask=is_slot, other=0.0))
    weights = weights * SCALING_FACTOR
    weights = round_to(weights, ROUNDING)

    is_token = is_row
    if is_padding_ptr is not None:
        is_token = is_token & (tl.load(is_padding_ptr + rows, mask=is_row, other=1) == 0)
    if num_valid_ptr is not None:
        is_token = is_token & (rows < tl.load(num_valid_ptr))
    if is_padding_ptr is not None or num_valid_ptr is not None:
        weights = tl.where(is_token[:, None], weights, 0.0)
        topk_ids = tl.where(is_token[:, None], topk_ids, SENTINEL)

    positions = rows[:, None] * TOP_K + slots
    is_written = is_row[:, None] & is_slot
    WEIGHTS: tl.constexpr = weights_ptr.dtype.element_ty
    tl.store(weights_ptr + positions, narrowed(weights, WEIGHTS), mask=is_written)
    tl.store(ids_ptr + positions, topk_ids.to(ids_ptr.dtype.element_ty), mask=is_written)


class Tile(NamedTuple):
    """Rows of one program, and the warps that share them."""

    rows: int
    num_warps: int


def choose_tile(num_tokens: int, block_e: int) -> Tile:
    """The fastest tile on an H200 (benchmarks/results): one row a program while programs are few or rows long."""
    if num_tokens <= 2048 or block_e > 128:
        return Tile(1, 1)
    return Tile(512 // block_e, 1)


_next_power_of_2 = functools.cache(triton.next_power_of_2)
# Kernels with their constant arguments, by all that they are specialised on: Triton's own look-up takes longer.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    per_expert_scale: torch.Tensor | None,
    is_padding: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    """Route into the two buffers with one launch."""
    tensors = (router_logits, per_expert_scale, is_padding, num_valid_tokens, topk_weights, topk_ids)
    if _device_count() > 1 and router_logits.get_device() != torch.accelerator.current_device_index():
        with torch.accelerator.device_index(router_logits.get_device()):
            _launch(spec, contract, *tensors)
    else:
        _launch(spec, contract, *tensors)


def _launch(
    spec: RouterSpec,
    contract: Contract,
    logits: torch.Tensor,
    scale: torch.Tensor | None,
    is_padding: torch.Tensor | None,
    num_valid: torch.Tensor | None,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> None:
    """Launch on the current device. A kernel seen before is launched on bare addresses, the cheapest way."""
    num_tokens, row_stride = logits.shape[0], logits.stride(0)
    tile = choose_tile(num_tokens, _next_power_of_2(spec.num_experts))
    grid = (-(-num_tokens // tile.rows), 1, 1)
    logits_at, weights_at, ids_at = logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
    scale_at = None if scale is None else scale.data_ptr()
    padding_at = None if is_padding is None else is_padding.data_ptr()
    valid_at = None if num_valid is None else num_valid.data_ptr()
    # Triton specialises on pointers that are multiples of 16; torch allocates no others, a view may be one.
    remainder = (logits_at | weights_at | ids_at | (scale_at or 0) | (padding_at or 0) | (valid_at or 0)) % 16
    specialization = (
        spec.key, contract.key, tile, row_stride, logits.device, logits.dtype, None if scale is None else scale.dtype,
        padding_at is None, valid_at is None, remainder,
    )  # fmt: skip
    known = _compiled.get(specialization)
    if num_tokens == 0:
        _check_support(logits, spec.num_experts)
    elif known is not None:
        kernel, constants = known
        kernel[grid](
            logits_at, scale_at, padding_at, valid_at, weights_at, ids_at, num_tokens, row_stride, *constants
        )  # fmt: skip
    else:
        _check_support(logits, spec.num_experts)
        constants = _constants(logits.dtype, spec, contract, tile)
        kernel = _route_kernel[grid](
            logits, scale, is_padding, num_valid, weights, ids, num_tokens, row_stride, *constants,
            num_warps=tile.num_warps,
        )  # fmt: skip
        if remainder == 0 and kernel is not None:  # the interpreter returns nothing
            _compiled[specialization] = kernel, constants


def _constants(logits_dtype: torch.dtype, spec: RouterSpec, contract: Contract, tile: Tile) -> tuple[Any, ...]:
    """The constexpr arguments of the kernel, in its order."""
    return (
        spec.num_experts,
        spec.top_k,
        spec.renormalize,
        spec.routed_scaling_factor,
        _TL_DTYPE[logits_dtype if spec.weights_rounding == "input" else torch.float32],
        contract.sentinel_id(spec.num_experts),
        tile.rows,
        _next_power_of_2(spec.num_experts),
        _next_power_of_2(spec.top_k),
    )


@functools.cache
def _device_count() -> int:
    return torch.accelerator.device_count()


def _check_support(router_logits: torch.Tensor, num_experts: int) -> None:
    if router_logits.is_cpu and isinstance(_route_kernel, triton.JITFunction):
        raise ValueError(
            "impl='triton' needs logits on a GPU, got a CPU tensor; use impl='cpu', or set TRITON_INTERPRET=1 "
            "before the first call to run the kernel in Triton's interpreter"
        )
    if num_experts > MAX_KERNEL_EXPERTS:
        raise ValueError(
            f"impl='triton' routes among at most {MAX_KERNEL_EXPERTS} experts, got {num_experts}; use impl='reference'"
        )
