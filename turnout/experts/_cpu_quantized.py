"""Quantised experts on a CPU: a few rows of a weight are dequantised at a time, into float32, and multiplied by torch.

The rows stay in a cache between the two. numba is imported at the first call.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from turnout.combine import cpu as combine
from turnout.contracts import Contract
from turnout.experts.cpu import ACTIVATION_CODE
from turnout.experts.quantization import SCHEMES, quantize_activations
from turnout.permutation import ops as permutation
from turnout.spec import ExpertsSpec
from turnout.threads import in_threads
from turnout.types import ExpertsWeights, Routing

# Numbers of a weight that are dequantised at a time, and never more than a quarter of it: 1 MiB of float32.
NUMBERS_AT_A_TIME = 1 << 18
NUMBERS_PER_THREAD = 1 << 17  # below, waking a thread costs more than it saves
ROWS_AT_A_TIME = 2048  # of the slots of an expert: bounds what a long prompt takes
ORDER = Contract(structures=("expert_offsets", "permuted_idx", "inv_permuted_idx"), structures_dtype=torch.int64)


def launch(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run one expert after the other, each on all its slots, and combine into ``out``."""
    _launch(hidden_states, weights, routing, spec, out, ROWS_AT_A_TIME)


def launch_batch_invariant(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """As `launch`, each slot on its own: a product of matrices may round otherwise for another number of rows."""
    _launch(hidden_states, weights, routing, spec, out, 1)


def _launch(
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    routing: Routing,
    spec: ExpertsSpec,
    out: torch.Tensor,
    rows_at_a_time: int,
) -> None:
    if not hidden_states.is_cpu:
        raise ValueError(
            f"impl='cpu' needs hidden_states on a CPU, got {hidden_states.device}; use impl='triton' or impl='auto'"
        )
    assert weights.gate_up_scale is not None, "experts refuses quantised weights without scales"
    assert weights.down_scale is not None, "experts refuses quantised weights without scales"
    num_experts, top_k = weights.down_proj.shape[0], routing.topk_ids.shape[1]
    buffers = permutation.permute(routing.topk_ids, None, num_experts, ORDER.key, "cpu")
    order = permutation.permutation_of(buffers, ORDER)
    assert order.expert_offsets is not None, "the contract asks for it"
    assert order.permuted_idx is not None, "the contract asks for it"
    offsets, outputs = (
        order.expert_offsets.tolist(),
        torch.empty(routing.topk_ids.numel(), out.shape[1], dtype=out.dtype),
    )
    for expert in range(num_experts):
        gate_up = weights.gate_up_proj[expert], weights.gate_up_scale[expert]
        down = weights.down_proj[expert], weights.down_scale[expert]
        for first in range(offsets[expert], offsets[expert + 1], rows_at_a_time):
            end = min(first + rows_at_a_time, offsets[expert + 1])
            hidden = hidden_states.index_select(0, order.permuted_idx[first:end] // top_k)
            values = _activated(_product(hidden, *gate_up, spec), spec).T.to(out.dtype)
            outputs[first:end] = _product(values, *down, spec).T
    combine.launch(outputs, routing.topk_weights, order.inv_permuted_idx, out)


def _product(values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, spec: ExpertsSpec) -> torch.Tensor:
    """``weight @ values.T`` [N, rows] in float32, for values [rows, columns] and one expert's weight of N rows."""
    scheme, columns = SCHEMES[spec.quantization], values.shape[1]
    value_scale = None
    if scheme.activation_dtype is not None:
        values, value_scale = quantize_activations(values, scheme.activation_dtype)
    values = values.float()
    num_rows = weight.shape[0]
    out = torch.empty(num_rows, len(values))
    block = max(1, min(NUMBERS_AT_A_TIME // columns, num_rows // 4))
    scratch = torch.empty(block, columns)
    for first in range(0, num_rows, block):
        end = min(first + block, num_rows)
        rows = scratch[: end - first]
        _dequantize(weight[first:end], scale[first:end], rows)
        torch.mm(rows, values.T, out=out[first:end])
    if value_scale is not None:
        out *= value_scale.T
    return out


def _activated(gate_up: torch.Tensor, spec: ExpertsSpec) -> torch.Tensor:
    """Activated values [I, rows] of a projection [2I, rows], which they overwrite."""
    gate = gate_up[: len(gate_up) // 2]
    limit = math.inf if spec.activation_limit is None else spec.activation_limit
    run = functools.partial(
        _kernels().activate_numbers, gate_up.data_ptr(), gate.numel(), ACTIVATION_CODE[spec.activation],
        spec.activation_alpha, limit, spec.up_offset,
    )  # fmt: skip
    in_threads(run, gate.numel(), min(torch.get_num_threads(), gate.numel() // NUMBERS_PER_THREAD))
    return gate


def _dequantize(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Rows of a weight into ``out`` [rows, columns] float32, on as many of torch's threads as it is worth."""
    scale = scale.float()
    kernel = getattr(_kernels(), _KERNEL_NAMES[weight.dtype])
    columns = out.shape[1]
    run = functools.partial(
        kernel, weight.data_ptr(), scale.data_ptr(), columns, columns // scale.shape[1], out.data_ptr()
    )
    in_threads(run, len(out), min(torch.get_num_threads(), out.numel() // NUMBERS_PER_THREAD))


_KERNEL_NAMES = {
    torch.int32: "dequantize_int4",
    torch.int8: "dequantize_int8",
    torch.float8_e4m3fn: "dequantize_float8",
}


@functools.cache
def _kernels() -> Any:
    from turnout.experts import _cpu_quantized_kernel

    return _cpu_quantized_kernel
