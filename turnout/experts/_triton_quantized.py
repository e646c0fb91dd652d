"""Experts of quantised weights in Triton: weights are read as they are stored, and dequantised in registers.

The kernels work on blocks of slots that share an expert. For few tokens each slot is a block of its own; for many the
blocks are those of the padded block map. A slot's bits do not depend on the other slots of its block.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from turnout.combine import triton as combine
from turnout.device.activation import activated
from turnout.device.launch import launch_kernel, on_device_of
from turnout.device.quantized import e4m3_of, product, quantized, round_to_integer
from turnout.device.rounding import narrowed, widened
from turnout.experts.quantization import SCHEMES, limits
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Permutation, Routing


@triton.jit
def _quantize_kernel(
    values_ptr,  # [rows, COLUMNS], rows STRIDE apart
    quantized_ptr,  # [rows, COLUMNS] int8, or uint8 for the bits of float8
    scale_ptr,  # [rows] float32
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIGHEST: tl.constexpr,
    SPAN: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows,). Each program quantises one row, held whole."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    values = widened(tl.load(values_ptr + row * STRIDE + columns, mask=columns < COLUMNS, other=0.0))
    values, scale = quantized(values, HIGHEST, SPAN, EPS, DTYPE)
    IS_INT8: tl.constexpr = quantized_ptr.dtype.element_ty == tl.int8
    values = round_to_integer(values).to(tl.int8) if IS_INT8 else e4m3_of(values)
    tl.store(quantized_ptr + row * COLUMNS + columns, values, mask=columns < COLUMNS)
    tl.store(scale_ptr + row + tl.arange(0, 1)[None, :], scale)


@triton.jit
def _block_of_slots(
    ids_ptr, sorted_ptr, expert_ids_ptr, num_post_padded_ptr, num_slots, NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The expert of this program's block (-1: none), its slots, and which of them there are."""
    block = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    if sorted_ptr is None:  # a block is one slot
        expert = tl.load(ids_ptr + block).to(tl.int64)
        expert = tl.where((expert >= 0) & (expert < NUM_EXPERTS), expert, -1)
        slots = block + rows
        is_slot = rows < 1
    else:
        expert = tl.load(expert_ids_ptr + block).to(tl.int64)
        expert = tl.where(block * BLOCK_M < tl.load(num_post_padded_ptr), expert, -1)
        slots = tl.load(sorted_ptr + block * BLOCK_M + rows).to(tl.int64)
        is_slot = slots < num_slots
    return expert, slots, is_slot


@triton.jit(do_not_specialize=["num_slots"])
def _quantized_gate_up_kernel(
    hidden_ptr,  # [T, H], rows STRIDE apart
    hidden_scale_ptr,  # [T] float32, or None
    weight_ptr,  # [E, 2I, H], int4: [E, 2I, H / 8]
    scale_ptr,  # [E, 2I, groups]
    ids_ptr,  # [S]
    sorted_ptr,  # the padded block map, or None: each slot is a block
    expert_ids_ptr,
    num_post_padded_ptr,
    activated_ptr,  # [S, I]
    num_slots,
    STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    GROUP: tl.constexpr,
    INT4: tl.constexpr,
    WIDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (blocks, ceil(I / BLOCK_N)). Each program: BLOCK_N activated values of the slots of a block."""
    expert, slots, is_slot = _block_of_slots(
        ids_ptr, sorted_ptr, expert_ids_ptr, num_post_padded_ptr, num_slots, NUM_EXPERTS, BLOCK_M
    )
    if expert < 0:
        return
    first = tl.program_id(1).to(tl.int64) * BLOCK_N
    # Gate and up by turns, in one product: they come apart where columns pair up.
    pairs = tl.arange(0, 2 * BLOCK_N)
    i = first + pairs // 2
    rows = expert * (2 * INTERMEDIATE) + tl.where(pairs % 2 == 0, i, i + INTERMEDIATE)
    STORED: tl.constexpr = HIDDEN // 8 if INT4 else HIDDEN
    GROUPS: tl.constexpr = 1 if GROUP is None else HIDDEN // GROUP
    tokens = slots // TOP_K
    gate_up = product(
        hidden_ptr + tokens * STRIDE, weight_ptr + rows * STORED, scale_ptr + rows * GROUPS,
        is_slot, i < INTERMEDIATE, HIDDEN, GROUP, INT4, WIDEN, BLOCK_M, 2 * BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if hidden_scale_ptr is not None:
        gate_up *= tl.load(hidden_scale_ptr + tokens, mask=is_slot, other=0.0)[:, None]
    gate, up = tl.split(tl.reshape(gate_up, [BLOCK_M, BLOCK_N, 2]))
    values = activated(gate, up, ACTIVATION, ALPHA, LIMIT, UP_OFFSET)
    i = first + tl.arange(0, BLOCK_N)
    DTYPE: tl.constexpr = activated_ptr.dtype.element_ty
    ptrs = activated_ptr + slots[:, None] * INTERMEDIATE + i[None, :]
    tl.store(ptrs, narrowed(values, DTYPE), mask=is_slot[:, None] & (i < INTERMEDIATE)[None, :])


@triton.jit(do_not_specialize=["num_slots"])
def _quantized_down_kernel(
    values_ptr,  # [S, I]
    values_scale_ptr,  # [S] float32, or None
    weight_ptr,  # [E, H, I], int4: [E, H, I / 8]
    scale_ptr,  # [E, H, groups]
    ids_ptr,  # [S]
    sorted_ptr,  # the padded block map, or None: each slot is a block
    expert_ids_ptr,
    num_post_padded_ptr,
    out_ptr,  # [S, H]
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    GROUP: tl.constexpr,
    INT4: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (blocks, ceil(H / BLOCK_N)). Each program: BLOCK_N outputs of the slots of a block."""
    expert, slots, is_slot = _block_of_slots(
        ids_ptr, sorted_ptr, expert_ids_ptr, num_post_padded_ptr, num_slots, NUM_EXPERTS, BLOCK_M
    )
    if expert < 0:
        return
    h = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = expert * HIDDEN + h
    STORED: tl.constexpr = INTERMEDIATE // 8 if INT4 else INTERMEDIATE
    GROUPS: tl.constexpr = 1 if GROUP is None else INTERMEDIATE // GROUP
    out = product(
        values_ptr + slots * INTERMEDIATE, weight_ptr + rows * STORED, scale_ptr + rows * GROUPS,
        is_slot, h < HIDDEN, INTERMEDIATE, GROUP, INT4, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if values_scale_ptr is not None:
        out *= tl.load(values_scale_ptr + slots, mask=is_slot, other=0.0)[:, None]
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    ptrs = out_ptr + slots[:, None] * HIDDEN + h[None, :]
    tl.store(ptrs, narrowed(out, DTYPE), mask=is_slot[:, None] & (h < HIDDEN)[None, :])


class Tile(NamedTuple):
    """Rows of a weight that a program multiplies, columns that it takes at a time, and its warps."""

    rows: int
    columns: int
    num_warps: int


# By slots of a block, of which the tensor cores take 16 at least.
TILES = {
    16: Tile(rows=64, columns=128, num_warps=4),
    32: Tile(rows=64, columns=128, num_warps=4),
    64: Tile(rows=128, columns=64, num_warps=4),
    128: Tile(rows=128, columns=64, num_warps=8),
}


def launch(
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    routing: Routing,
    spec: ExpertsSpec,
    out: torch.Tensor,
) -> None:
    """Run the experts of few tokens into ``out``: each slot reads the weights of its expert."""
    launch_blocks(hidden_states, weights, routing, spec, Permutation(), out)


def launch_blocks(
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    routing: Routing,
    spec: ExpertsSpec,
    blocks: Permutation,
    out: torch.Tensor,
) -> None:
    """Run the experts into ``out``, on the blocks of a padded block map; where it has none, slot by slot.

    Quantise, gate_up and activation, quantise, down, weighted sum: five launches, three if no activation is quantised.
    """
    check_support(hidden_states, spec)
    if len(hidden_states) == 0:
        return
    widen = spec.quantization == "w8a8_fp8" and not multiplies_float8()
    (num_tokens, hidden_size), num_experts = hidden_states.shape, len(weights.down_proj)
    slots, intermediate_size = num_tokens * routing.topk_ids.shape[1], weights.gate_up_proj.shape[1] // 2
    with on_device_of(hidden_states):
        hidden, scale = _quantize(hidden_states, spec, widen)
        values = _empty(hidden_states, slots, intermediate_size)
        _launch_gate_up(hidden, scale, weights, spec, routing.topk_ids, blocks, values)
        quantized_values, scale = _quantize(values, spec, widen)
        outputs = _empty(hidden_states, slots, hidden_size)
        _launch_down(quantized_values, scale, weights, spec, routing.topk_ids, blocks, outputs)
        combine.launch_slots(outputs, routing.topk_weights, routing.topk_ids, num_experts, out)


def _launch_gate_up(
    hidden: torch.Tensor,
    hidden_scale: torch.Tensor | None,
    weights: ExpertsWeights,
    spec: ExpertsSpec,
    topk_ids: torch.Tensor,
    blocks: Permutation,
    values: torch.Tensor,
) -> None:
    (slots, intermediate_size), hidden_size = values.shape, hidden.shape[1]
    num_blocks, block_size = _size_of(blocks, slots)
    tile, widen = TILES[block_size], hidden.dtype == torch.uint8
    launch_kernel(
        _quantized_gate_up_kernel,
        (num_blocks, triton.cdiv(2 * intermediate_size, tile.rows), 1),
        (hidden, hidden_scale, _stored(weights.gate_up_proj, widen), weights.gate_up_scale, topk_ids,
         blocks.sorted_token_ids, blocks.expert_ids, blocks.num_tokens_post_padded, values),
        (slots,),
        (_stride(hidden), topk_ids.shape[1], len(weights.down_proj), hidden_size, intermediate_size,
         *_scheme_of(spec, widen), spec.activation, spec.activation_alpha, spec.activation_limit, spec.up_offset,
         block_size, tile.rows // 2, columns_at_a_time(hidden_size, spec, tile)),
        tile.num_warps,
    )  # fmt: skip


def _launch_down(
    values: torch.Tensor,
    values_scale: torch.Tensor | None,
    weights: ExpertsWeights,
    spec: ExpertsSpec,
    topk_ids: torch.Tensor,
    blocks: Permutation,
    outputs: torch.Tensor,
) -> None:
    (slots, hidden_size), intermediate_size = outputs.shape, values.shape[1]
    num_blocks, block_size = _size_of(blocks, slots)
    tile, widen = TILES[block_size], values.dtype == torch.uint8
    launch_kernel(
        _quantized_down_kernel,
        (num_blocks, triton.cdiv(hidden_size, tile.rows), 1),
        (values, values_scale, _stored(weights.down_proj, widen), weights.down_scale, topk_ids,
         blocks.sorted_token_ids, blocks.expert_ids, blocks.num_tokens_post_padded, outputs),
        (slots,),
        (len(weights.down_proj), hidden_size, intermediate_size, *_scheme_of(spec, widen),
         block_size, tile.rows, columns_at_a_time(intermediate_size, spec, tile)),
        tile.num_warps,
    )  # fmt: skip


def _size_of(blocks: Permutation, slots: int) -> tuple[int, int]:
    """How many blocks there are at most, and slots in each; without a map each slot is one, in a tile of the least."""
    if blocks.sorted_token_ids is None or blocks.expert_ids is None:
        return slots, min(TILES)
    return len(blocks.expert_ids), len(blocks.sorted_token_ids) // len(blocks.expert_ids)


def _scheme_of(spec: ExpertsSpec, widen: bool) -> tuple[int | None, bool, bool]:
    return spec.group_size, SCHEMES[spec.quantization].weight_bits == 4, widen


def _quantize(values: torch.Tensor, spec: ExpertsSpec, widen: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows as the scheme's activations, and their scales [rows]; as they are where it quantises none."""
    dtype = SCHEMES[spec.quantization].activation_dtype
    if dtype is None:
        return values, None
    rows, columns = values.shape
    quantized_values = torch.empty_strided((rows, columns), (columns, 1), dtype=dtype, device=values.device)
    scale = torch.empty_strided((rows,), (1,), dtype=torch.float32, device=values.device)
    stored = _stored(quantized_values, dtype.is_floating_point)
    lowest, highest = limits(dtype, 8)
    block = _next_power_of_2(columns)
    launch_kernel(
        _quantize_kernel, (rows, 1, 1), (values, stored, scale), (),
        (_stride(values), columns, highest, highest - lowest, torch.finfo(values.dtype).eps, block),
        max(1, min(8, block // 512)),
    )  # fmt: skip
    return (stored if widen else quantized_values), scale


def _stride(rows: torch.Tensor) -> int:
    """How far rows lie apart, which kernels are compiled for; of one row it may be anything."""
    return rows.stride(0) if len(rows) > 1 else 0


def _stored(tensor: torch.Tensor, as_bytes: bool) -> torch.Tensor:
    return tensor.view(torch.uint8) if as_bytes else tensor


def _empty(beside: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.empty_strided((rows, columns), (columns, 1), dtype=beside.dtype, device=beside.device)


def columns_at_a_time(columns: int, spec: ExpertsSpec, tile: Tile) -> int:
    """A power of two of columns: inside of a group, or whole groups where the dequantised weight is multiplied."""
    group = spec.group_size
    if group is None:
        return max(32, min(tile.columns, int(_next_power_of_2(columns))))
    if spec.quantization == "w4a16" and group & (group - 1) == 0:
        return math.gcd(columns, tile.columns)
    return math.gcd(group, tile.columns)


_next_power_of_2 = functools.cache(triton.next_power_of_2)


@functools.cache
def multiplies_float8() -> bool:
    """Whether the GPU's own multiplication takes float8_e4m3fn; elsewhere its numbers are widened to float16."""
    if not isinstance(_quantize_kernel, triton.JITFunction):
        return True  # the interpreter
    target = triton.runtime.driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch >= 89)


def check_support(hidden_states: torch.Tensor, spec: ExpertsSpec) -> None:
    if hidden_states.is_cpu and isinstance(_quantize_kernel, triton.JITFunction):
        raise ValueError(
            "this implementation needs hidden_states on a GPU, got a CPU tensor; use impl='cpu', or set "
            "TRITON_INTERPRET=1 before the first call to run the kernels in Triton's interpreter"
        )
    if spec.group_size is not None and spec.group_size % 32:
        raise ValueError(
            f"the Triton kernels read groups of a multiple of 32 columns, got group_size={spec.group_size}; "
            "use impl='reference'"
        )
