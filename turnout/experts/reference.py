"""The mathematics of the experts in plain torch: short, slow, and what every kernel is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from turnout.combine import reference as combine
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing


def expert_reference(
    hidden_states: torch.Tensor, weights: ExpertsWeights, expert: int, spec: ExpertsSpec
) -> torch.Tensor:
    """One expert's output [rows, H] for hidden states [rows, H]; two roundings: the activation and the output."""
    gate_up_proj, down_proj = weights.gate_up_proj[expert], weights.down_proj[expert]
    if not spec.transposed:
        gate_up_proj, down_proj = gate_up_proj.T, down_proj.T
    gate_up = hidden_states.float() @ gate_up_proj.float()
    if weights.gate_up_bias is not None:
        gate_up = gate_up + weights.gate_up_bias[expert].float()
    values = activation(gate_up, spec).to(hidden_states.dtype)
    output = values.float() @ down_proj.float()
    if weights.down_bias is not None:
        output = output + weights.down_bias[expert].float()
    return output.to(hidden_states.dtype)


def activation(gate_up: torch.Tensor, spec: ExpertsSpec) -> torch.Tensor:
    """``activation(gate) * (up + up_offset)`` [rows, I] of a float32 projection [rows, 2I]."""
    if spec.interleaved:
        gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=-1)
    if spec.activation_limit is not None:
        gate = gate.clamp(max=spec.activation_limit)
        up = up.clamp(-spec.activation_limit, spec.activation_limit)
    if spec.activation == "silu":
        gate = gate * torch.sigmoid(spec.activation_alpha * gate)
    else:
        approximate = "tanh" if spec.activation == "gelu_tanh" else "none"
        gate = torch.nn.functional.gelu(gate, approximate=approximate)
    return gate * (up + spec.up_offset)


def launch(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run one expert after the other, each on all its tokens, and combine into ``out``; the host waits for the ids."""
    run_experts(expert_reference, hidden_states, weights, routing, spec, out)


def launch_batch_invariant(
    hidden_states: torch.Tensor, weights: ExpertsWeights, routing: Routing, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """As `launch`, each slot on its own: a matrix product may round otherwise for another number of rows."""
    run_experts(expert_reference, hidden_states, weights, routing, spec, out, rows_at_a_time=1)


def run_experts(
    run_expert: Callable[[torch.Tensor, ExpertsWeights, int, ExpertsSpec], torch.Tensor],
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    routing: Routing,
    spec: ExpertsSpec,
    out: torch.Tensor,
    rows_at_a_time: int | None = None,
) -> None:
    """Call ``run_expert`` for each expert, on all its slots or on so many at a time, and combine into ``out``."""
    topk_ids = routing.topk_ids.long()
    num_experts, top_k = weights.gate_up_proj.shape[0], topk_ids.shape[1]
    slot_outputs = out.new_zeros(topk_ids.numel(), out.shape[1])
    for expert in range(num_experts):
        slots = (topk_ids.flatten() == expert).nonzero().flatten()
        for some in slots.split(rows_at_a_time or max(1, len(slots))):
            if len(some) > 0:
                slot_outputs[some] = run_expert(hidden_states[some // top_k], weights, expert, spec)
    combine.launch(slot_outputs, routing.topk_weights, None, out)
