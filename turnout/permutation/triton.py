"""Permutation in Triton, for CUDA, ROCm and XPU devices: one launch for few slots, two for many.

For many slots a fixed number of programs each take a run of slots. The first launch counts them per program and expert;
in the second each program sums those counts to learn where its slots go.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from turnout.contracts import Contract
from turnout.device import MAX_KERNEL_EXPERTS
from turnout.device.launch import launch_kernel, on_device_of, refuse_cpu
from turnout.device.permute import (
    MAX_TILE_SLOTS,
    ROWS,
    count_slots,
    fill,
    load_experts,
    max_blocks,
    of_expert,
    permute_in_one_program,
    sort_slots,
    starts_of,
    write_bitmatrix,
    write_expert_structures,
    write_slot_structures,
    write_unused,
)
from turnout.device.routing import route_rows
from turnout.device.scores import EXACT
from turnout.routing import triton as routing
from turnout.routing.inputs import RoutingTensors
from turnout.spec import RouterSpec
from turnout.types import Permutation, Routing

# Slots that one program orders, in one launch.
MAX_SLOTS_OF_ONE_LAUNCH = MAX_TILE_SLOTS


@triton.jit(do_not_specialize=["num_tokens", "map_size"])
def _permute_kernel(
    ids_ptr,
    map_ptr,
    weights_ptr,
    tokens_per_expert_ptr,
    expert_offsets_ptr,
    permuted_idx_ptr,
    inv_permuted_idx_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    bitmatrix_ptr,
    permuted_weights_ptr,
    block_offsets_ptr,
    block_schedule_ptr,
    num_tokens,
    map_size,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (1,)."""
    permute_in_one_program(
        ids_ptr, map_ptr, weights_ptr, tokens_per_expert_ptr, expert_offsets_ptr, permuted_idx_ptr,
        inv_permuted_idx_ptr, sorted_token_ids_ptr, expert_ids_ptr, num_tokens_post_padded_ptr, bitmatrix_ptr,
        permuted_weights_ptr, block_offsets_ptr, block_schedule_ptr, num_tokens, map_size, NUM_EXPERTS, TOP_K,
        BLOCK_SIZE, BLOCK_S, BLOCK_E, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "row_stride"])
def _route_permute_kernel(
    logits_ptr,  # [T, E], rows row_stride apart
    scale_ptr,  # the fields of RoutingTensors, in their order; absent ones are None
    is_padding_ptr,
    num_valid_ptr,
    expert_map_ptr,
    bias_ptr,
    input_ids_ptr,
    given_ids_ptr,
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K]
    tokens_per_expert_ptr,
    expert_offsets_ptr,
    permuted_idx_ptr,
    inv_permuted_idx_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    bitmatrix_ptr,
    permuted_weights_ptr,
    block_offsets_ptr,
    block_schedule_ptr,
    num_tokens,
    row_stride,
    RECIPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_LOGITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (1,). Route all rows, BLOCK_T at a time, then order their slots."""
    for start in range(0, num_tokens, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T).to(tl.int64)
        route_rows(  # no physical experts, and nothing to record
            logits_ptr, scale_ptr, is_padding_ptr, num_valid_ptr, expert_map_ptr, bias_ptr, input_ids_ptr,
            given_ids_ptr, None, None, None, None, None, None, weights_ptr, ids_ptr, rows, num_tokens, row_stride,
            RECIPE, BLOCK_T, BLOCK_LOGITS, BLOCK_K,
        )  # fmt: skip
    tl.debug_barrier()  # ids and weights are read by other threads than wrote them
    permute_in_one_program(  # the ids are mapped
        ids_ptr, None, weights_ptr, tokens_per_expert_ptr, expert_offsets_ptr, permuted_idx_ptr,
        inv_permuted_idx_ptr, sorted_token_ids_ptr, expert_ids_ptr, num_tokens_post_padded_ptr, bitmatrix_ptr,
        permuted_weights_ptr, block_offsets_ptr, block_schedule_ptr, num_tokens, 0, RECIPE.num_ids, RECIPE.top_k,
        BLOCK_SIZE, BLOCK_S, BLOCK_E, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "map_size", "run"])
def _count_kernel(
    ids_ptr,  # [T, K]
    map_ptr,  # [map_size] or None
    counts_ptr,  # [programs, E] int32
    sorted_token_ids_ptr,
    bitmatrix_ptr,
    num_tokens,
    map_size,
    run,  # slots of a program, a multiple of BLOCK_S
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (programs,). Each program counts its run of slots, and writes what needs no order."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    num_slots = num_tokens.to(tl.int64) * TOP_K
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(program * run, tl.minimum((program + 1) * run, num_slots), BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        experts = load_experts(ids_ptr, map_ptr, map_size, slots, slots < num_slots, NUM_EXPERTS, BLOCK_E)
        counts += count_slots(experts, BLOCK_E)
    columns = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + program * NUM_EXPERTS + columns, counts, mask=columns < NUM_EXPERTS)
    if sorted_token_ids_ptr is not None:
        end = max_blocks(num_slots, NUM_EXPERTS, BLOCK_SIZE) * BLOCK_SIZE
        fill(sorted_token_ids_ptr, num_slots, 0, end, program, programs)
    if bitmatrix_ptr is not None:
        write_bitmatrix(
            ids_ptr, map_ptr, map_size, bitmatrix_ptr, num_tokens, program, programs, NUM_EXPERTS, TOP_K, BLOCK_K
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "map_size", "run"])
def _place_kernel(
    ids_ptr,  # [T, K]
    map_ptr,  # [map_size] or None
    weights_ptr,  # [T, K] or None
    counts_ptr,  # [programs, E] int32
    tokens_per_expert_ptr,
    expert_offsets_ptr,
    permuted_idx_ptr,
    inv_permuted_idx_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    permuted_weights_ptr,
    block_offsets_ptr,
    block_schedule_ptr,
    num_tokens,
    map_size,
    run,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: (programs,), after `_count_kernel` on the same grid. Each program places its run of slots."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    num_slots = num_tokens.to(tl.int64) * TOP_K
    columns = tl.arange(0, BLOCK_E)[None, :]
    counts = tl.zeros([BLOCK_E], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)  # slots of programs before this one
    for start in range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        is_count = (rows < programs) & (columns < NUM_EXPERTS)
        tile = tl.load(counts_ptr + rows * NUM_EXPERTS + columns, mask=is_count, other=0)
        counts += tl.sum(tile, axis=0)
        before += tl.sum(tl.where(rows < program, tile, 0), axis=0)
    if program == 0:
        write_expert_structures(
            counts, tokens_per_expert_ptr, expert_offsets_ptr, num_tokens_post_padded_ptr, block_offsets_ptr,
            NUM_EXPERTS, BLOCK_SIZE, BLOCK_E,
        )  # fmt: skip
    write_unused(
        counts, num_slots, program, programs,
        permuted_idx_ptr, expert_ids_ptr, permuted_weights_ptr, block_schedule_ptr, NUM_EXPERTS, BLOCK_SIZE,
    )  # fmt: skip
    next_positions = starts_of(counts) + before
    for start in range(program * run, tl.minimum((program + 1) * run, num_slots), BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        experts = load_experts(ids_ptr, map_ptr, map_size, slots, slots < num_slots, NUM_EXPERTS, BLOCK_E)
        in_tile = count_slots(experts, BLOCK_E)
        experts, slots = sort_slots(experts, BLOCK_S)
        # A sorted slot stands as far behind the tile's first of its expert as that expert's next position asks.
        positions = of_expert(next_positions - starts_of(in_tile), experts, BLOCK_E) + tl.arange(0, BLOCK_S)
        write_slot_structures(
            experts, start + slots, positions, counts, num_slots, weights_ptr,
            permuted_idx_ptr, inv_permuted_idx_ptr, sorted_token_ids_ptr, expert_ids_ptr, permuted_weights_ptr,
            block_schedule_ptr, NUM_EXPERTS, BLOCK_SIZE, BLOCK_E,
        )  # fmt: skip
        next_positions += in_tile


class Shares(NamedTuple):
    """How slots are shared out."""

    programs: int
    run: int  # slots of a program, in tiles
    tile: int  # slots that are sorted together
    num_warps: int


def share_out(num_slots: int, num_experts: int) -> Shares:
    """Tiles of 512 slots, over as many programs as keep the matrix of counts, which each program reads, small."""
    tile = 512
    tiles = -(-num_slots // tile)
    most = max(32, min(256, 32768 // num_experts))
    tiles_of_one = -(-tiles // most)
    return Shares(-(-tiles // tiles_of_one), tiles_of_one * tile, tile, 4)


def tile_of_one_launch(num_slots: int) -> tuple[int, int]:
    """Slots of the tile, with which a program orders all of them, and its warps: no two threads hold one slot."""
    tile = max(32, _next_power_of_2(num_slots))
    return tile, min(8, tile // 32)


_next_power_of_2 = functools.cache(triton.next_power_of_2)


def experts_of_tile(num_experts: int) -> int:
    """The width of what a program holds of all experts; itself the number of no expert."""
    return max(32, int(_next_power_of_2(num_experts)))


def launch(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    num_experts: int,
    contract: Contract,
    permutation: Permutation,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Write the structures whose buffers are there, in at most two launches."""
    _check_support(topk_ids, num_experts)
    few = topk_ids.shape[0] * topk_ids.shape[1] <= MAX_SLOTS_OF_ONE_LAUNCH
    with on_device_of(topk_ids):
        (_launch_one if few else _launch_two)(topk_ids, expert_map, topk_weights, num_experts, contract, permutation)


def launch_routed(
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    tensors: RoutingTensors,
    out: Routing,
) -> None:
    """Route, and write the structures: one launch for few slots, the routing's and two more for many."""
    weights, ids, *structures = out
    num_ids = contract.num_ids(spec.num_experts)
    if router_logits.shape[0] * spec.top_k > MAX_SLOTS_OF_ONE_LAUNCH:
        routing.launch(router_logits, spec, contract, tensors, weights, ids)
        launch(ids, weights, num_ids, contract, out.permutation)
        return
    routing.check_support(router_logits, spec.num_experts)
    num_tokens = router_logits.shape[0]
    tile, num_warps = tile_of_one_launch(num_tokens * spec.top_k)
    logits_tile = rows_of_one_launch(num_tokens, spec.num_experts, num_warps)
    recipe, rows, block_logits, block_k = routing.constants_of(spec, contract, tensors, logits_tile)
    constants = (recipe, contract.block_size or 1, rows, block_logits, tile, experts_of_tile(num_ids), block_k)
    with on_device_of(router_logits):
        launch_kernel(
            _route_permute_kernel, (1, 1, 1), (router_logits, *tensors[:7], weights, ids, *structures),
            (num_tokens, router_logits.stride(0)), constants, num_warps, **EXACT,
        )  # fmt: skip


def rows_of_one_launch(num_tokens: int, num_experts: int, num_warps: int) -> routing.Tile:
    """Rows that one program routes at a time: all, up to 64 logits a thread."""
    rows = 2048 * num_warps // _next_power_of_2(num_experts)
    return routing.Tile(max(1, min(rows, _next_power_of_2(max(1, num_tokens)))), num_warps)


def _launch_one(
    ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    weights: torch.Tensor | None,
    num_experts: int,
    contract: Contract,
    permutation: Permutation,
) -> None:
    num_tokens, top_k = ids.shape
    tile, num_warps = tile_of_one_launch(num_tokens * top_k)
    constants = (
        num_experts, top_k, contract.block_size or 1, tile, experts_of_tile(num_experts), _next_power_of_2(top_k)
    )  # fmt: skip
    tensors, numbers = (ids, expert_map, weights, *permutation), (num_tokens, _size_of(expert_map))
    launch_kernel(_permute_kernel, (1, 1, 1), tensors, numbers, constants, num_warps)


def _launch_two(
    ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    weights: torch.Tensor | None,
    num_experts: int,
    contract: Contract,
    permutation: Permutation,
) -> None:
    num_tokens, top_k = ids.shape
    shares = share_out(num_tokens * top_k, num_experts)
    grid, numbers = (shares.programs, 1, 1), (num_tokens, _size_of(expert_map), shares.run)
    counts = torch.empty_strided(
        (shares.programs, num_experts), (num_experts, 1), dtype=torch.int32, device=ids.device
    )  # fmt: skip
    constants = (num_experts, top_k, contract.block_size or 1, shares.tile, experts_of_tile(num_experts))
    counted = (ids, expert_map, counts, permutation.sorted_token_ids, permutation.bitmatrix)
    launch_kernel(_count_kernel, grid, counted, numbers, (*constants, _next_power_of_2(top_k)), shares.num_warps)
    placed = [buffer for name, buffer in zip(permutation._fields, permutation, strict=True) if name != "bitmatrix"]
    tensors = (ids, expert_map, weights, counts, *placed)
    launch_kernel(_place_kernel, grid, tensors, numbers, constants, shares.num_warps)


def _size_of(expert_map: torch.Tensor | None) -> int:
    return 0 if expert_map is None else expert_map.shape[0]


def _check_support(topk_ids: torch.Tensor, num_experts: int) -> None:
    refuse_cpu(_permute_kernel, topk_ids, "ids")
    if num_experts > MAX_KERNEL_EXPERTS:
        raise ValueError(
            f"impl='triton' permutes among at most {MAX_KERNEL_EXPERTS} experts, got {num_experts}; "
            "use impl='reference'"
        )
