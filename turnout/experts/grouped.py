"""Experts for many tokens: grouped GEMMs in Triton over blocks of slots that share an expert, then a weighted sum.

The blocks are those of the padded block map, which the routing launch or `turnout.permute` writes. Activations and
outputs stay in the order of the slots, so nothing is gathered into a copy.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from turnout.combine import triton as combine
from turnout.device.activation import activated
from turnout.device.launch import on_device_of, refuse_cpu
from turnout.device.rounding import narrowed, widened
from turnout.experts._grouped_blocks import block_map, rows_of
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Permutation, Routing


@triton.jit
def _block_and_tile(num_blocks, NUM_COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The block of slots and the tile of columns of this program.

    Programs that run together share GROUP_M blocks, so that a tile of weights is read once for them.
    """
    TILES: tl.constexpr = (NUM_COLUMNS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    first = program // (GROUP_M * TILES) * GROUP_M
    in_group = program % (GROUP_M * TILES)
    blocks = tl.minimum(num_blocks - first, GROUP_M)
    return first + in_group % blocks, in_group // blocks


@triton.jit
def _weight_tile(
    weight,  # descriptor of [E * R, C], or pointer to [E, R, C] or, if TRANSPOSED, to [E, C, R]
    expert,
    rows,  # [BLOCK_N] of the expert's R rows
    start,  # the first of BLOCK_K columns
    NUM_ROWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_DESCRIPTOR: tl.constexpr,
):
    """[BLOCK_K, BLOCK_N] of an expert's weight, transposed for the product; zeros past its last column.

    Rows past the last one may be anything: their products are not stored.
    """
    if IS_DESCRIPTOR:
        row = expert * NUM_ROWS + tl.min(rows, axis=0)
        return weight.load([row.to(tl.int32), start]).T
    else:
        columns = start + tl.arange(0, BLOCK_K).to(tl.int64)
        ROW: tl.constexpr = 1 if TRANSPOSED else NUM_COLUMNS
        COLUMN: tl.constexpr = NUM_ROWS if TRANSPOSED else 1
        weight += expert * (NUM_ROWS * NUM_COLUMNS)
        mask = (rows < NUM_ROWS)[None, :] & (columns < NUM_COLUMNS)[:, None]
        return tl.load(weight + rows[None, :] * ROW + columns[:, None] * COLUMN, mask=mask, other=0.0)


@triton.jit
def _add_product(total, rows, weight_tile, is_slot):
    """``total + rows @ weight_tile`` for the rows that are slots."""
    if rows.dtype == tl.float32:
        # Step by step, where the compiler would make one long sum of it: that errs more than float32 need.
        return total + tl.where(is_slot[:, None], tl.dot(rows, weight_tile, input_precision="ieee"), 0.0)
    else:
        return tl.dot(rows, weight_tile, total)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _grouped_gate_up_kernel(
    hidden_ptr,  # [T, H], rows HIDDEN_STRIDE apart
    weight,  # [E, 2I, H], or [E, H, 2I] if TRANSPOSED
    bias_ptr,  # [E, 2I] or None
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    activated_ptr,  # [S, I]
    num_slots,
    num_blocks,
    HIDDEN_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    IS_DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (blocks * ceil(I / BLOCK_N),). Each program: BLOCK_N activated values of BLOCK_M slots of one expert."""
    block, tile = _block_and_tile(num_blocks, INTERMEDIATE, BLOCK_N, GROUP_M)
    if block * BLOCK_M >= tl.load(num_tokens_post_padded_ptr):
        return
    expert = tl.load(expert_ids_ptr + block).to(tl.int64)
    if expert < 0:
        return
    slots = tl.load(sorted_token_ids_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    is_slot = slots < num_slots
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = i < INTERMEDIATE
    gate_row = i * 2 if INTERLEAVED else i
    up_row = gate_row + 1 if INTERLEAVED else gate_row + INTERMEDIATE
    columns = tl.arange(0, BLOCK_K)
    hidden_ptrs = hidden_ptr + (slots // TOP_K)[:, None] * HIDDEN_STRIDE + columns[None, :]

    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        hidden = tl.load(hidden_ptrs + start, mask=is_slot[:, None] & (columns < HIDDEN - start)[None, :], other=0.0)
        gate_weight = _weight_tile(
            weight, expert, gate_row, start, 2 * INTERMEDIATE, HIDDEN, TRANSPOSED, BLOCK_K, IS_DESCRIPTOR
        )
        up_weight = _weight_tile(
            weight, expert, up_row, start, 2 * INTERMEDIATE, HIDDEN, TRANSPOSED, BLOCK_K, IS_DESCRIPTOR
        )
        gate = _add_product(gate, hidden, gate_weight, is_slot)
        up = _add_product(up, hidden, up_weight, is_slot)
    if bias_ptr is not None:
        bias_ptr += expert * (2 * INTERMEDIATE)
        gate += widened(tl.load(bias_ptr + gate_row, mask=is_row, other=0.0))[None, :]
        up += widened(tl.load(bias_ptr + up_row, mask=is_row, other=0.0))[None, :]
    values = activated(gate, up, ACTIVATION, ALPHA, LIMIT, UP_OFFSET)
    DTYPE: tl.constexpr = activated_ptr.dtype.element_ty
    ptrs = activated_ptr + slots[:, None] * INTERMEDIATE + i[None, :]
    tl.store(ptrs, narrowed(values, DTYPE), mask=is_slot[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _grouped_down_kernel(
    activated_ptr,  # [S, I]
    weight,  # [E, H, I], or [E, I, H] if TRANSPOSED
    bias_ptr,  # [E, H] or None
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    out_ptr,  # [S, H]
    num_slots,
    num_blocks,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    IS_DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (blocks * ceil(H / BLOCK_N),). Each program: BLOCK_N outputs of BLOCK_M slots of one expert."""
    block, tile = _block_and_tile(num_blocks, HIDDEN, BLOCK_N, GROUP_M)
    if block * BLOCK_M >= tl.load(num_tokens_post_padded_ptr):
        return
    expert = tl.load(expert_ids_ptr + block).to(tl.int64)
    if expert < 0:
        return
    slots = tl.load(sorted_token_ids_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    is_slot = slots < num_slots
    h = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = h < HIDDEN
    columns = tl.arange(0, BLOCK_K)
    value_ptrs = activated_ptr + slots[:, None] * INTERMEDIATE + columns[None, :]
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, INTERMEDIATE, BLOCK_K):
        mask = is_slot[:, None] & (columns < INTERMEDIATE - start)[None, :]
        values = tl.load(value_ptrs + start, mask=mask, other=0.0)
        weight_tile = _weight_tile(weight, expert, h, start, HIDDEN, INTERMEDIATE, TRANSPOSED, BLOCK_K, IS_DESCRIPTOR)
        out = _add_product(out, values, weight_tile, is_slot)
    if bias_ptr is not None:
        bias_ptr += expert * HIDDEN
        out += widened(tl.load(bias_ptr + h, mask=is_row, other=0.0))[None, :]
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    ptrs = out_ptr + slots[:, None] * HIDDEN + h[None, :]
    tl.store(ptrs, narrowed(out, DTYPE), mask=is_slot[:, None] & is_row[None, :])


class Tile(NamedTuple):
    """The tile of a program, and how it is run."""

    rows: int  # slots
    columns: int  # of the result
    depth: int  # summed at a time
    group: int  # blocks of slots that share weights in the cache
    num_warps: int
    num_stages: int


# By slots of a block: the fastest on an H100 (benchmarks/results), for 16-bit weights.
GATE_UP_TILES = {
    16: Tile(16, 32, 128, 1, 4, 4),
    32: Tile(32, 64, 128, 1, 4, 3),
    64: Tile(64, 64, 64, 1, 4, 4),
    128: Tile(128, 128, 64, 4, 8, 4),
}
DOWN_TILES = {
    16: Tile(16, 64, 128, 1, 4, 4),
    32: Tile(32, 64, 128, 1, 4, 3),
    64: Tile(64, 128, 64, 1, 4, 4),
    128: Tile(128, 256, 64, 4, 8, 4),
}
INVARIANT_ROWS = 64  # of the tile that batch_invariant=True takes
EXACT_DEPTH = 16  # float32 products run on no matrix unit: what is summed at a time is unrolled


def launch(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run the experts of every token into ``out``: two grouped GEMMs, then the weighted sum.

    The padded block map is taken from ``routing`` if it is there, and written before if not.
    """
    _launch(hidden_states, weights, routing, spec, out, None)


def launch_batch_invariant(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """As `launch`, with one tile for any number of tokens.

    On NVIDIA's Hopper all tiles sum alike, as the tests show there. That is the hardware's doing, and not promised.
    """
    _launch(hidden_states, weights, routing, spec, out, INVARIANT_ROWS)


def _launch(
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    routing: Routing,
    spec: ExpertsSpec,
    out: torch.Tensor,
    rows: int | None,
) -> None:
    num_tokens, hidden_size = hidden_states.shape
    refuse_cpu(_grouped_gate_up_kernel, hidden_states, "tokens", impl="grouped")
    if num_tokens == 0:
        return
    num_experts, top_k = weights.down_proj.shape[0], routing.topk_ids.shape[1]
    intermediate_size = weights.down_proj.shape[1 if spec.transposed else 2]
    num_slots = num_tokens * top_k
    values, outputs = (
        torch.empty_strided((num_slots, n), (n, 1), dtype=hidden_states.dtype, device=hidden_states.device)
        for n in (intermediate_size, hidden_size)
    )
    with on_device_of(hidden_states):
        blocks = block_map(routing, num_experts, GATE_UP_TILES, rows)
        _launch_gate_up(hidden_states, weights, spec, blocks, values, top_k)
        _launch_down(values, weights, spec, blocks, outputs)
        combine.launch_slots(outputs, routing.topk_weights, routing.topk_ids, num_experts, out)


def _launch_gate_up(
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    spec: ExpertsSpec,
    blocks: Permutation,
    values: torch.Tensor,
    top_k: int,
) -> None:
    num_slots, intermediate_size = values.shape
    tile = _fitted(GATE_UP_TILES[rows_of(blocks)], 2, hidden_states)
    hidden_stride = hidden_states.stride(0) if len(hidden_states) > 1 else 0  # of one row it may be anything
    weight, is_descriptor = _weight_argument(weights.gate_up_proj, spec, tile)
    num_blocks = blocks.expert_ids.numel()  # type: ignore[union-attr]
    _grouped_gate_up_kernel[(num_blocks * triton.cdiv(intermediate_size, tile.columns),)](
        hidden_states, weight, weights.gate_up_bias,
        blocks.sorted_token_ids, blocks.expert_ids, blocks.num_tokens_post_padded, values, num_slots, num_blocks,
        hidden_stride, top_k, hidden_states.shape[1], intermediate_size, spec.transposed, spec.interleaved,
        spec.activation, spec.activation_alpha, spec.activation_limit, spec.up_offset, is_descriptor,
        *tile[:4], num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _launch_down(
    values: torch.Tensor, weights: ExpertsWeights, spec: ExpertsSpec, blocks: Permutation, outputs: torch.Tensor
) -> None:
    num_slots, hidden_size = outputs.shape
    tile = _fitted(DOWN_TILES[rows_of(blocks)], 1, values)
    weight, is_descriptor = _weight_argument(weights.down_proj, spec, tile)
    num_blocks = blocks.expert_ids.numel()  # type: ignore[union-attr]
    _grouped_down_kernel[(num_blocks * triton.cdiv(hidden_size, tile.columns),)](
        values, weight, weights.down_bias,
        blocks.sorted_token_ids, blocks.expert_ids, blocks.num_tokens_post_padded, outputs, num_slots, num_blocks,
        hidden_size, values.shape[1], spec.transposed, is_descriptor,
        *tile[:4], num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _fitted(tile: Tile, num_weights: int, rows: torch.Tensor) -> Tile:
    """The tile for products with the rows of a tensor, with as many stages as the shared memory holds.

    It is shallow for float32, which is multiplied exactly, and at most half as deep as the rows are long: of a single
    step the compiler makes a sum that starts from the bias, and a row's bits would depend on the size of its block.
    """
    most = EXACT_DEPTH if rows.element_size() == 4 else tile.depth
    tile = tile._replace(depth=min(most, max(16, triton.next_power_of_2(rows.shape[1]) // 2)))
    stage = (tile.rows + num_weights * tile.columns) * tile.depth * rows.element_size()
    return tile._replace(num_stages=max(1, min(tile.num_stages, _shared_memory(rows.get_device()) // stage)))


@functools.cache
def _shared_memory(device: int) -> int:
    """Bytes that a program can have; of no concern to the interpreter (device -1)."""
    if device < 0:
        return 1 << 30
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


def _weight_argument(weight: torch.Tensor, spec: ExpertsSpec, tile: Tile) -> tuple[Any, bool]:
    """The weight as the kernel takes it, and whether that is a descriptor, which large tiles load faster through.

    A descriptor's rows must be whole multiples of 16 bytes, and a tile's rows lie together.
    """
    experts, rows, columns = weight.shape
    fits = weight.data_ptr() % 16 == 0 and columns * weight.element_size() % 16 == 0
    if tile.rows < 64 or spec.transposed or spec.interleaved or not fits:
        return weight, False
    block = [tile.columns, tile.depth]
    return TensorDescriptor(weight, [experts * rows, columns], [columns, 1], block), True
