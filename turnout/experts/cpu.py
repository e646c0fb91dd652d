"""Experts on a CPU: GEMMs through torch for many rows, own kernels for few rows and where torch's GEMM is slow.

torch multiplies matrices of float32 fast, and 16-bit ones where the CPU has instructions for them; a matrix and few
rows, or a small matrix, cost it more than the arithmetic. The kernels work on addresses and dtype codes, so that they
read and write every dtype in place, and a call makes few tensors. numba is imported at the first call.
"""

from __future__ import annotations

import functools
import itertools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from turnout.combine.cpu import WEIGHTS_CODE, like_of
from turnout.spec import ExpertsSpec
from turnout.threads import in_threads
from turnout.types import ExpertsWeights, Routing

# An expert's rows go through torch if there are more than FEW_ROWS and they make more than FEW_PRODUCTS products with
# its weights; before that, own kernels are faster (measured on an AMD EPYC with AVX2).
FEW_ROWS = 16
FEW_PRODUCTS = 1 << 19
# Work is shared out among threads from this many products on: below, waking a thread costs more than it saves.
PRODUCTS_PER_THREAD = 1 << 19
BLOCK_ROWS = 64  # rows of an expert that own kernels take at a time

_IDS_CODE = {torch.int16: 0, torch.int32: 1, torch.uint32: 1, torch.int64: 2}
ACTIVATION_CODE = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def launch(
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    routing: Routing,
    spec: ExpertsSpec,
    out: torch.Tensor,
) -> None:
    """Run the experts of every token into ``out``; how a row is rounded may depend on how many share its experts."""
    few = routing.topk_ids.numel()
    if _has_fast_gemm(hidden_states.dtype):
        few = max(FEW_ROWS, FEW_PRODUCTS // max(1, _products_of_a_row(weights)))
    _launch(hidden_states, weights, routing, spec, out, Split(few, BLOCK_ROWS))


def launch_batch_invariant(
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    routing: Routing,
    spec: ExpertsSpec,
    out: torch.Tensor,
) -> None:
    """As `launch`, each slot on its own: a product of matrices may round otherwise for another number of rows."""
    _launch(hidden_states, weights, routing, spec, out, Split(routing.topk_ids.numel(), 1))


class Split(NamedTuple):
    """Who computes the rows of an expert: own kernels up to ``few`` rows, so many at a time, else torch."""

    few: int
    block_rows: int


def _products_of_a_row(weights: ExpertsWeights) -> int:
    return 3 * weights.down_proj.shape[1] * weights.down_proj.shape[2]


@functools.cache
def _has_fast_gemm(dtype: torch.dtype) -> bool:
    """Whether torch's GEMM of this dtype runs on instructions made for it."""
    if dtype == torch.float32:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())


def _launch(
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    routing: Routing,
    spec: ExpertsSpec,
    out: torch.Tensor,
    split: Split,
) -> None:
    if not hidden_states.is_cpu:
        raise ValueError(
            f"impl='cpu' needs hidden_states on a CPU, got {hidden_states.device}; use impl='triton' or impl='auto'"
        )
    kernels = _kernels()
    like = like_of(out.dtype)
    topk_ids, num_experts, num_slots = routing.topk_ids, weights.down_proj.shape[0], routing.topk_ids.numel()
    sorting = torch.empty(num_experts + 1 + 5 * num_slots, dtype=torch.int32)  # offsets, order, positions, blocks
    order = sorting.data_ptr() + 4 * (num_experts + 1)
    positions, blocks = order + 4 * num_slots, order + 8 * num_slots
    num_blocks, num_rows, num_valid = kernels.sort_slots(
        topk_ids.data_ptr(), _IDS_CODE[topk_ids.dtype], routing.topk_weights.data_ptr(),
        WEIGHTS_CODE[routing.topk_weights.dtype], num_slots, num_experts, split.block_rows, split.few,
        sorting.data_ptr(), order, positions, blocks,
    )  # fmt: skip
    intermediate_size = weights.down_proj.shape[1 if spec.transposed else 2]
    between = torch.empty(num_slots * (intermediate_size + out.shape[1]), dtype=out.dtype)  # activated, slot_out
    activated = between.data_ptr()
    call = kernels.Call(
        hidden_states.data_ptr(), hidden_states.stride(0), out.shape[1], intermediate_size,
        topk_ids.shape[1], weights.gate_up_proj.data_ptr(), weights.down_proj.data_ptr(),
        _address(weights.gate_up_bias), _address(weights.down_bias), spec.transposed, spec.interleaved,
        ACTIVATION_CODE[spec.activation], spec.activation_alpha,
        math.inf if spec.activation_limit is None else spec.activation_limit, spec.up_offset,
        order, positions, blocks, num_slots, num_blocks, min(split.block_rows, num_slots),
        activated, activated + num_slots * intermediate_size * out.element_size(),
        routing.topk_weights.data_ptr(), WEIGHTS_CODE[routing.topk_weights.dtype], out.data_ptr(),
    )  # fmt: skip
    if num_rows < num_valid:
        offsets = sorting[: num_experts + 1].tolist()
        _through_torch(call, like, weights, spec, offsets, split.few, between)
    _through_own_kernels(call, like, len(out), num_rows)


def _through_own_kernels(call: Any, like: Any, num_tokens: int, num_rows: int) -> None:
    """The experts of few rows, and the sum of all outputs."""
    kernels = _kernels()
    threads = _threads(num_rows * 3 * call.hidden_size * call.intermediate_size)
    threads_to_combine = _threads(call.num_slots * call.hidden_size)
    if max(threads, threads_to_combine) <= 1:
        kernels.run_part(like, kernels.ALL, 0, num_tokens, *call)
        return
    for part, count, share_among in (
        (kernels.GATE_UP, call.intermediate_size, threads),
        (kernels.DOWN, call.hidden_size, threads),
        (kernels.COMBINE, num_tokens, threads_to_combine),
    ):
        in_threads(_share_of(call, kernels.run_part, like, part), count, share_among)


def _share_of(call: Any, kernel: Callable[..., None], *before: Any) -> Callable[[int, int], None]:
    """A kernel that takes some arguments, the start and end of a share, and the fields of a call."""

    def run(start: int, end: int) -> None:
        kernel(*before, start, end, *call)

    return run


def _through_torch(
    call: Any,
    like: Any,
    weights: ExpertsWeights,
    spec: ExpertsSpec,
    offsets: list[int],
    few: int,
    between: torch.Tensor,
) -> None:
    """The experts of more than ``few`` rows, one after the other."""
    kernels = _kernels()
    split = call.num_slots * call.intermediate_size
    activated, slot_out = between[:split].view(call.num_slots, -1), between[split:].view(call.num_slots, -1)
    gate_up_proj, down_proj = (
        weight if spec.transposed else weight.transpose(1, 2) for weight in (weights.gate_up_proj, weights.down_proj)
    )
    largest = max(end - start for start, end in itertools.pairwise(offsets))
    gathered = slot_out.new_empty(largest, call.hidden_size)
    gate_up = slot_out.new_empty(largest, 2 * call.intermediate_size)
    for expert, (first, end) in enumerate(itertools.pairwise(offsets)):
        rows = end - first
        if rows <= few:
            continue
        gather = _share_of(call, kernels.gather_rows, like, gathered.data_ptr(), first)
        in_threads(gather, rows, _threads(rows * call.hidden_size))
        torch.mm(gathered[:rows], gate_up_proj[expert], out=gate_up[:rows])
        activate = _share_of(call, kernels.activate_rows, like, gate_up.data_ptr(), expert, first)
        in_threads(activate, rows, _threads(rows * call.intermediate_size * 8))
        values, output = activated[first:end], slot_out[first:end]
        if weights.down_bias is None:
            torch.mm(values, down_proj[expert], out=output)
        else:
            torch.addmm(weights.down_bias[expert], values, down_proj[expert], out=output)


def _threads(products: int) -> int:
    return min(torch.get_num_threads(), products // PRODUCTS_PER_THREAD)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _kernels() -> types.ModuleType:
    from turnout.experts import _cpu_kernel

    return _cpu_kernel
