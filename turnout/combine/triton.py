"""Combine as one Triton launch, for CUDA, ROCm and XPU devices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turnout.device.launch import launch_kernel, on_device_of, refuse_cpu
from turnout.device.rounding import narrowed, widened

NUM_WARPS = 4
MOST_COLUMNS = 1024  # of one program: a thread loads 16 bytes of 16-bit numbers at a time
MOST_ROWS = 8  # whose loads are in flight at once


@triton.jit(do_not_specialize=["row_stride"])
def _combine_kernel(
    expert_out_ptr,  # [rows, H], rows row_stride apart
    topk_weights_ptr,  # [T, K]
    inv_permuted_ptr,  # [T, K] or None
    ids_ptr,  # [T, K] or None: slots whose id is no expert are skipped
    out_ptr,  # [T, H]
    row_stride,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,  # rows whose loads are in flight at once
):
    """Grid: (T, ceil(H / BLOCK_H)). Each program sums BLOCK_H columns of one token's K rows."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_column = columns < HIDDEN
    total = tl.zeros([BLOCK_H], tl.float32)
    for first in range(0, TOP_K, UNROLL):
        for k in tl.static_range(UNROLL):
            is_slot = first + k < TOP_K
            slot = token * TOP_K + first + k
            weight = widened(tl.load(topk_weights_ptr + slot, mask=is_slot, other=0.0))
            row = slot
            if inv_permuted_ptr is not None:
                row = tl.load(inv_permuted_ptr + slot, mask=is_slot, other=-1).to(tl.int64)
            is_slot = (row >= 0) & (weight != 0.0)
            if ids_ptr is not None:
                expert = tl.load(ids_ptr + slot, mask=is_slot, other=-1).to(tl.int64)
                is_slot = is_slot & (expert >= 0) & (expert < NUM_EXPERTS)
            values = tl.load(expert_out_ptr + row * row_stride + columns, mask=is_column & is_slot, other=0.0)
            total += tl.where(is_slot, weight, 0.0) * widened(values)  # what does not count is not read
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + token * HIDDEN + columns, narrowed(total, DTYPE), mask=is_column)


def launch(
    expert_out: torch.Tensor, topk_weights: torch.Tensor, inv_permuted_idx: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Combine ``expert_out`` [rows, H] into ``out`` [T, H] with one launch."""
    _launch(expert_out, topk_weights, inv_permuted_idx, None, 0, out)


def launch_slots(
    expert_out: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, out: torch.Tensor
) -> None:
    """Combine the slots [S, H] whose id is an expert, for implementations that leave the other rows unwritten."""
    _launch(expert_out, topk_weights, None, topk_ids, num_experts, out)


def _launch(
    expert_out: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
    num_experts: int,
    out: torch.Tensor,
) -> None:
    refuse_cpu(_combine_kernel, out, "expert_out")
    (num_tokens, hidden_size), top_k = out.shape, topk_weights.shape[1]
    if num_tokens * top_k * hidden_size == 0:
        out.zero_()
        return
    block = min(MOST_COLUMNS, triton.next_power_of_2(hidden_size))
    with on_device_of(out):
        launch_kernel(
            _combine_kernel,
            (num_tokens, triton.cdiv(hidden_size, block), 1),
            (expert_out, topk_weights, inv_permuted_idx, topk_ids, out),
            (expert_out.stride(0),),
            (hidden_size, top_k, num_experts, block, min(MOST_ROWS, triton.next_power_of_2(top_k))),
            NUM_WARPS,
        )
