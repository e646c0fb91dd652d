"""Experts for few tokens: two Triton launches that read the weights of each slot's expert once, at the rate of memory.

Every slot is computed on its own, in an order that only the sizes of the weights decide: a row's bits do not depend on
its batch. Where many tokens share experts, ``grouped`` reads less.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from turnout.device.activation import activated
from turnout.device.launch import launch_kernel, on_device_of, refuse_cpu
from turnout.device.rounding import narrowed, widened
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing


@triton.jit
def _experts_gate_up_kernel(
    hidden_ptr,  # [T, H], rows HIDDEN_STRIDE apart
    weight_ptr,  # [E, 2I, H], or [E, H, 2I] if TRANSPOSED
    bias_ptr,  # [E, 2I] or None
    ids_ptr,  # [S]
    activated_ptr,  # [S, I]
    HIDDEN_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Grid: (S, ceil(I / BLOCK_ROWS)). Each program computes BLOCK_ROWS activated values of one slot."""
    slot = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    i = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = i < INTERMEDIATE
    gate_row = i * 2 if INTERLEAVED else i
    up_row = gate_row + 1 if INTERLEAVED else gate_row + INTERMEDIATE
    ROW: tl.constexpr = 1 if TRANSPOSED else HIDDEN
    hidden_ptr += (slot // TOP_K) * HIDDEN_STRIDE
    weight_ptr += expert * (2 * INTERMEDIATE * HIDDEN)
    gate_ptrs = weight_ptr + gate_row[:, None] * ROW
    up_ptrs = weight_ptr + up_row[:, None] * ROW

    # Lanes keep their own sums until the end: one reduction, and every load of the row in flight at once.
    gate = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, HIDDEN, BLOCK_COLUMNS):
        h = start + tl.arange(0, BLOCK_COLUMNS)
        columns = h.to(tl.int64) * (2 * INTERMEDIATE) if TRANSPOSED else h
        mask = is_row[:, None] & (h < HIDDEN)[None, :]
        hidden = widened(tl.load(hidden_ptr + h, mask=h < HIDDEN, other=0.0))[None, :]
        gate += widened(tl.load(gate_ptrs + columns[None, :], mask=mask, other=0.0)) * hidden
        up += widened(tl.load(up_ptrs + columns[None, :], mask=mask, other=0.0)) * hidden
    gate = tl.sum(gate, axis=1)
    up = tl.sum(up, axis=1)
    if bias_ptr is not None:
        bias_ptr += expert * (2 * INTERMEDIATE)
        gate += widened(tl.load(bias_ptr + gate_row, mask=is_row, other=0.0))
        up += widened(tl.load(bias_ptr + up_row, mask=is_row, other=0.0))
    values = activated(gate, up, ACTIVATION, ALPHA, LIMIT, UP_OFFSET)
    DTYPE: tl.constexpr = activated_ptr.dtype.element_ty
    tl.store(activated_ptr + slot * INTERMEDIATE + i, narrowed(values, DTYPE), mask=is_row)


@triton.jit
def _experts_down_kernel(
    activated_ptr,  # [S, I]
    weight_ptr,  # [E, H, I], or [E, I, H] if TRANSPOSED
    bias_ptr,  # [E, H] or None
    ids_ptr,  # [S]
    topk_weights_ptr,  # [S]
    out_ptr,  # [T, H]
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,  # experts whose loads are in flight at once; 0: not even those of one
):
    """Grid: (T, ceil(H / BLOCK_ROWS)). Each program computes BLOCK_ROWS outputs of one token from all its experts."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = h < HIDDEN
    ROW: tl.constexpr = 1 if TRANSPOSED else INTERMEDIATE
    row_ptrs = weight_ptr + h[:, None] * ROW
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    biases = tl.zeros([BLOCK_ROWS], tl.float32)
    AT_ONCE: tl.constexpr = max(1, UNROLL)
    for first in range(0, TOP_K, AT_ONCE):
        for k in tl.static_range(AT_ONCE):
            slot = token * TOP_K + first + k
            is_slot = first + k < TOP_K
            expert = tl.load(ids_ptr + slot, mask=is_slot, other=-1).to(tl.int64)
            topk_weight = widened(tl.load(topk_weights_ptr + slot, mask=is_slot, other=0.0))
            # What does not count is not read: it may be NaN.
            is_slot = (expert >= 0) & (expert < NUM_EXPERTS) & (topk_weight != 0.0)
            topk_weight = tl.where(is_slot, topk_weight, 0.0)
            expert = tl.where(is_slot, expert, 0)
            value_ptr = activated_ptr + slot * INTERMEDIATE
            expert_ptrs = row_ptrs + expert * (HIDDEN * INTERMEDIATE)
            if UNROLL > 0:
                for start in tl.static_range(0, INTERMEDIATE, BLOCK_COLUMNS):
                    total = _add_columns(
                        total, value_ptr, expert_ptrs, topk_weight, is_row, is_slot, start,
                        HIDDEN, INTERMEDIATE, TRANSPOSED, BLOCK_COLUMNS,
                    )  # fmt: skip
            else:
                for start in range(0, INTERMEDIATE, BLOCK_COLUMNS):
                    total = _add_columns(
                        total, value_ptr, expert_ptrs, topk_weight, is_row, is_slot, start,
                        HIDDEN, INTERMEDIATE, TRANSPOSED, BLOCK_COLUMNS,
                    )  # fmt: skip
            if bias_ptr is not None:
                bias = widened(tl.load(bias_ptr + expert * HIDDEN + h, mask=is_row & is_slot, other=0.0))
                biases += topk_weight * bias
    out = tl.sum(total, axis=1) + biases
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + token * HIDDEN + h, narrowed(out, DTYPE), mask=is_row)


@triton.jit
def _add_columns(
    total,  # [rows, BLOCK_COLUMNS]
    value_ptr,
    expert_ptrs,
    topk_weight,
    is_row,
    is_slot,
    start,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``total`` and the products of BLOCK_COLUMNS columns of an expert, from ``start`` on."""
    i = start + tl.arange(0, BLOCK_COLUMNS)
    columns = i.to(tl.int64) * HIDDEN if TRANSPOSED else i
    is_column = (i < INTERMEDIATE) & is_slot
    values = widened(tl.load(value_ptr + i, mask=is_column, other=0.0))
    weight = tl.load(expert_ptrs + columns[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
    return total + widened(weight) * (topk_weight * values)[None, :]


class Tile(NamedTuple):
    """Rows of a weight that a program multiplies, columns that it takes at a time, and its warps.

    The fastest on an H100 (benchmarks/results). Of transposed weights it is rows that lie together: a square.
    """

    rows: int
    columns: int
    num_warps: int


def gate_up_tile(hidden_size: int, transposed: bool) -> Tile:
    """A row whole, as far as the registers hold it."""
    if transposed:
        return Tile(64, 64, 4)
    columns = min(4096, max(32, triton.next_power_of_2(hidden_size)))
    return Tile(4096 // columns, columns, 4)


def down_tile(intermediate_size: int, transposed: bool) -> Tile:
    """Little at a time, and all experts of a token."""
    if transposed:
        return Tile(64, 64, 4)
    columns = min(256, max(32, triton.next_power_of_2(intermediate_size)))
    return Tile(512 // columns, columns, 1)


def experts_at_once(top_k: int, intermediate_size: int, columns: int) -> int:
    """Experts that `_experts_down_kernel` unrolls: all, unless that makes a large kernel."""
    return int(min(triton.next_power_of_2(top_k), 32 // triton.cdiv(intermediate_size, columns)))


def launch(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run the experts of every token into ``out`` with two launches."""
    num_tokens = hidden_states.shape[0]
    refuse_cpu(_experts_gate_up_kernel, hidden_states, "tokens")
    if num_tokens == 0:
        return
    top_k = routing.topk_ids.shape[1]
    hidden_stride = hidden_states.stride(0) if num_tokens > 1 else 0  # of one row it may be anything
    gate_up, down = _plan(spec, top_k, *weights.down_proj.shape, hidden_stride)
    values = torch.empty_strided(
        (num_tokens * top_k, gate_up.num_rows), (gate_up.num_rows, 1),
        dtype=hidden_states.dtype, device=hidden_states.device,
    )  # fmt: skip
    with on_device_of(hidden_states):
        launch_kernel(
            _experts_gate_up_kernel,
            (num_tokens * top_k, gate_up.programs, 1),
            (hidden_states, weights.gate_up_proj, weights.gate_up_bias, routing.topk_ids, values),
            (),
            gate_up.constants,
            gate_up.num_warps,
        )
        launch_kernel(
            _experts_down_kernel,
            (num_tokens, down.programs, 1),
            (values, weights.down_proj, weights.down_bias, routing.topk_ids, routing.topk_weights, out),
            (),
            down.constants,
            down.num_warps,
        )


class _Launch(NamedTuple):
    """What a launch needs beside its tensors."""

    num_rows: int  # of the result, for each slot or token
    programs: int  # that share them
    constants: tuple[Any, ...]
    num_warps: int


@functools.cache
def _plan(
    spec: ExpertsSpec, top_k: int, num_experts: int, rows: int, columns: int, hidden_stride: int
) -> tuple[_Launch, _Launch]:
    """The two launches for weights down_proj [E, rows, columns]."""
    hidden_size, intermediate_size = (columns, rows) if spec.transposed else (rows, columns)
    sizes = (top_k, num_experts, hidden_size, intermediate_size, spec.transposed)
    activation = (spec.activation, spec.activation_alpha, spec.activation_limit, spec.up_offset)
    tile = gate_up_tile(hidden_size, spec.transposed)
    gate_up = _Launch(
        intermediate_size,
        triton.cdiv(intermediate_size, tile.rows),
        (hidden_stride, *sizes, spec.interleaved, *activation, tile.rows, tile.columns),
        tile.num_warps,
    )
    tile = down_tile(intermediate_size, spec.transposed)
    down = _Launch(
        hidden_size,
        triton.cdiv(hidden_size, tile.rows),
        (*sizes, tile.rows, tile.columns, experts_at_once(top_k, intermediate_size, tile.columns)),
        tile.num_warps,
    )
    return gate_up, down
