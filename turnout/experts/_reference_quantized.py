"""The mathematics of quantised experts in plain torch: short, slow, and what every kernel is compared with."""

from __future__ import annotations

import torch

from turnout.experts.quantization import SCHEMES, dequantized, quantize_activations
from turnout.experts.reference import activation, run_experts
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing


def expert_reference(
    hidden_states: torch.Tensor, weights: ExpertsWeights, expert: int, spec: ExpertsSpec
) -> torch.Tensor:
    """One expert's output [rows, H] for hidden states [rows, H].

    The activation and the output are rounded as those of plain weights are; what a scheme rounds beside that, it
    rounds as `turnout.experts.quantization` says.
    """
    assert weights.gate_up_scale is not None, "experts refuses quantised weights without scales"
    assert weights.down_scale is not None, "experts refuses quantised weights without scales"
    gate_up = product(hidden_states, weights.gate_up_proj[expert], weights.gate_up_scale[expert], spec)
    values = activation(gate_up, spec).to(hidden_states.dtype)
    return product(values, weights.down_proj[expert], weights.down_scale[expert], spec).to(hidden_states.dtype)


def product(values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, spec: ExpertsSpec) -> torch.Tensor:
    """``values @ weight.T`` [rows, N] in float32 for values [rows, columns] and one expert's weight of N rows.

    The dequantised weight is rounded to the dtype of values that are not quantised. Products of quantised numbers are
    summed in float64, and so exactly.
    """
    dtype = SCHEMES[spec.quantization].activation_dtype
    weight = dequantized(weight, scale, spec)
    if dtype is None:
        return values.float() @ weight.to(values.dtype).float().T
    quantized, value_scale = quantize_activations(values, dtype)
    return ((quantized.double() @ weight.double().T) * value_scale.double()).float()


def launch(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run one expert after the other, each on all its slots, and combine into ``out``; waits for the device."""
    run_experts(expert_reference, hidden_states, weights, routing, spec, out)


def launch_batch_invariant(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """As `launch`, each slot on its own: a matrix product may round otherwise for another number of rows."""
    run_experts(expert_reference, hidden_states, weights, routing, spec, out, rows_at_a_time=1)
