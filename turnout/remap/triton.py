"""Remap, and the experts on remapped rows, in Triton, for CUDA, ROCm and XPU devices.

The permutation's launches, one or two, give each slot its row; another one copies the rows. The GEMMs find their
expert from the numbers of rows, on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from turnout.contracts import Contract
from turnout.device import MAX_KERNEL_EXPERTS
from turnout.device.activation import activated
from turnout.device.launch import launch_kernel, on_device_of, refuse_cpu
from turnout.device.rounding import narrowed, widened
from turnout.permutation import triton as permutation
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Permutation


@triton.jit(do_not_specialize=["num_tokens"])
def _copy_rows_kernel(
    hidden_ptr,  # [T, H] integers, rows ROW_STRIDE apart
    scales_ptr,  # [T, G] integers, rows SCALES_STRIDE apart, or None
    positions_ptr,  # [T, K]
    tokens_per_expert_ptr,  # [E]
    rows_ptr,  # [S, H]
    row_scales_ptr,  # [S, G] or None
    num_tokens,
    ROW_STRIDE: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    SCALES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: (ceil(T / BLOCK_T), ceil(H / BLOCK_H)). Each program copies BLOCK_H columns of its tokens to K rows each.

    It also writes zeros to the rows that have its slots' numbers, where they lie past the last expert's rows.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    is_token, is_column, is_scale = tokens < num_tokens, columns < HIDDEN, columns < SCALES
    experts = tl.arange(0, BLOCK_E)
    used = tl.sum(tl.load(tokens_per_expert_ptr + experts, mask=experts < NUM_EXPERTS, other=0), axis=0)
    values = tl.load(hidden_ptr + tokens * ROW_STRIDE + columns, mask=is_token & is_column, other=0)
    if scales_ptr is not None:
        scales = tl.load(scales_ptr + tokens * SCALES_STRIDE + columns, mask=is_token & is_scale, other=0)
    for k in range(TOP_K):
        slots = tokens * TOP_K + k
        positions = tl.load(positions_ptr + slots, mask=is_token, other=-1).to(tl.int64)
        is_used, is_unused = positions >= 0, is_token & (slots >= used)
        tl.store(rows_ptr + positions * HIDDEN + columns, values, mask=is_used & is_column)
        tl.store(rows_ptr + slots * HIDDEN + columns, tl.zeros_like(values), mask=is_unused & is_column)
        if scales_ptr is not None:
            tl.store(row_scales_ptr + positions * SCALES + columns, scales, mask=is_used & is_scale)
            tl.store(row_scales_ptr + slots * SCALES + columns, tl.zeros_like(scales), mask=is_unused & is_scale)


class CopyTile(NamedTuple):
    """What a program copies at once."""

    tokens: int
    columns: int


def choose_copy_tile(columns: int) -> CopyTile:
    """A part of one row: there are as many programs as tokens at least, and each stores K times what it loads."""
    return CopyTile(1, min(1024, triton.next_power_of_2(columns)))


class GemmTile(NamedTuple):
    """Rows, output columns and input columns that a program multiplies at once."""

    rows: int
    outs: int
    ins: int


def choose_gemm_tile(num_rows: int, num_experts: int) -> GemmTile:
    """No taller than the mean number of rows of an expert, within what tl.dot takes. (Not tuned on any device.)."""
    return GemmTile(min(64, max(16, triton.next_power_of_2(num_rows // num_experts))), 64, 32)


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
    """Remap integers into the buffers with three launches; two for few slots."""
    num_experts = len(tokens_per_expert)
    _check_support(hidden_states, num_experts)
    written = Permutation(tokens_per_expert=tokens_per_expert, inv_permuted_idx=inv_permuted_idx)
    with on_device_of(hidden_states):
        permutation.launch(topk_ids, None, num_experts, Contract(), written, expert_map)
        _copy(hidden_states, hidden_states_scales, inv_permuted_idx, tokens_per_expert, rows, scales)


def _copy(
    hidden_states: torch.Tensor,
    hidden_states_scales: torch.Tensor | None,
    positions: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    (num_tokens, top_k), num_experts, hidden_size = positions.shape, len(counts), rows.shape[1]
    num_scales, scales_stride = 0, 0
    if hidden_states_scales is not None:
        num_scales, scales_stride = hidden_states_scales.shape[1], hidden_states_scales.stride(0)
    columns = max(hidden_size, num_scales)
    if num_tokens == 0 or columns == 0:
        return
    tile = choose_copy_tile(columns)
    constants = (
        hidden_states.stride(0), scales_stride, top_k, hidden_size, num_scales,
        num_experts, permutation.experts_of_tile(num_experts), *tile,
    )  # fmt: skip
    tensors = (hidden_states, hidden_states_scales, positions, counts, rows, scales)
    grid = (triton.cdiv(num_tokens, tile.tokens), triton.cdiv(columns, tile.columns), 1)
    launch_kernel(_copy_rows_kernel, grid, tensors, (num_tokens,), constants, 4)


@triton.jit
def _segment_of(counts_ptr, tile, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile of BLOCK_M rows, the tile's first row and the first row past the expert's.

    Every expert's rows fill tiles of their own. Past the last tile in use the expert is at least NUM_EXPERTS.
    """
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < NUM_EXPERTS, other=0)
    tiles = tl.cdiv(counts, BLOCK_M)
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    is_before = experts < expert
    first_row = tl.sum(tl.where(is_before, counts, 0), axis=0).to(tl.int64)
    first_tile = tl.sum(tl.where(is_before, tiles, 0), axis=0)
    end = first_row + tl.sum(tl.where(experts == expert, counts, 0), axis=0)
    return expert, first_row + (tile - first_tile) * BLOCK_M, end


@triton.jit(do_not_specialize=["num_rows"])
def _remapped_gemm_kernel(
    rows_ptr,  # [S, IN]
    weight_ptr,  # [E, OUT, IN] by its strides; if GATED [E, 2 * OUT, IN]
    bias_ptr,  # [E, OUT] or None; if GATED [E, 2 * OUT]
    counts_ptr,  # [E]
    out_ptr,  # [S, OUT]
    num_rows,
    EXPERT_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (tiles of rows at most, ceil(OUT / BLOCK_N)). Each program: BLOCK_N outputs of BLOCK_M rows."""
    tile = tl.program_id(0).to(tl.int64)
    expert, first_row, end = _segment_of(counts_ptr, tile, NUM_EXPERTS, BLOCK_E, BLOCK_M)
    if expert >= NUM_EXPERTS:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = rows < tl.minimum(end, num_rows)
    outs = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_out = outs < OUT
    ins = tl.arange(0, BLOCK_K)
    gate_rows = outs * 2 if GATED and INTERLEAVED else outs
    up_rows = outs * 2 + 1 if INTERLEAVED else outs + OUT
    row_ptrs = rows_ptr + rows[:, None] * IN + ins[None, :]
    weight_ptrs = weight_ptr + expert.to(tl.int64) * EXPERT_STRIDE + ins[:, None].to(tl.int64) * COLUMN_STRIDE
    gate_ptrs = weight_ptrs + gate_rows[None, :] * ROW_STRIDE
    up_ptrs = weight_ptrs + up_rows[None, :] * ROW_STRIDE

    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, IN, BLOCK_K):
        is_in = ins < IN - start
        values = tl.load(row_ptrs, mask=is_row[:, None] & is_in[None, :], other=0.0)
        weight = tl.load(gate_ptrs, mask=is_out[None, :] & is_in[:, None], other=0.0)
        gate = tl.dot(values, weight, gate, input_precision="ieee")
        if GATED:
            weight = tl.load(up_ptrs, mask=is_out[None, :] & is_in[:, None], other=0.0)
            up = tl.dot(values, weight, up, input_precision="ieee")
        row_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K * COLUMN_STRIDE
        up_ptrs += BLOCK_K * COLUMN_STRIDE
    if bias_ptr is not None:
        bias_ptr += expert.to(tl.int64) * (2 * OUT if GATED else OUT)
        gate += widened(tl.load(bias_ptr + gate_rows, mask=is_out, other=0.0))[None, :]
        if GATED:
            up += widened(tl.load(bias_ptr + up_rows, mask=is_out, other=0.0))[None, :]
    if GATED:
        gate = activated(gate, up, ACTIVATION, ALPHA, LIMIT, UP_OFFSET)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    out_ptrs = out_ptr + rows[:, None] * OUT + outs[None, :]
    tl.store(out_ptrs, narrowed(gate, DTYPE), mask=is_row[:, None] & is_out[None, :])


def launch_experts(
    rows: torch.Tensor, tokens_per_expert: torch.Tensor, weights: ExpertsWeights, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run each expert on its rows, into ``out``, with two launches."""
    _check_support(rows, len(tokens_per_expert))
    if len(rows) == 0:
        return
    gate_up, down = (
        weight.transpose(1, 2) if spec.transposed else weight for weight in (weights.gate_up_proj, weights.down_proj)
    )
    values = rows.new_empty((len(rows), down.shape[2]))
    activation = (spec.activation, spec.activation_alpha, spec.activation_limit, spec.up_offset)
    with on_device_of(rows):
        _launch_gemm(
            rows, tokens_per_expert, gate_up, weights.gate_up_bias, (True, spec.interleaved, *activation), values
        )
        _launch_gemm(values, tokens_per_expert, down, weights.down_bias, (False, False, *activation), out)


def _launch_gemm(
    rows: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: tuple[bool | str | float | None, ...],
    out: torch.Tensor,
) -> None:
    num_rows, num_experts, columns = len(rows), len(tokens_per_expert), out.shape[1]
    tile = choose_gemm_tile(num_rows, num_experts)
    grid = (num_rows // tile.rows + min(num_rows, num_experts), triton.cdiv(columns, tile.outs), 1)
    constants = (
        *weight.stride(), rows.shape[1], columns, *activation,
        num_experts, permutation.experts_of_tile(num_experts), *tile,
    )  # fmt: skip
    launch_kernel(_remapped_gemm_kernel, grid, (rows, weight, bias, tokens_per_expert, out), (num_rows,), constants, 4)


def _check_support(tensor: torch.Tensor, num_experts: int) -> None:
    refuse_cpu(_copy_rows_kernel, tensor, "tensors")
    if num_experts > MAX_KERNEL_EXPERTS:
        raise ValueError(
            f"impl='triton' takes at most {MAX_KERNEL_EXPERTS} experts, got {num_experts}; use impl='reference'"
        )
