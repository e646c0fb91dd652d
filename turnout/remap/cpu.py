"""Remap on a CPU: two passes over the slots, then torch's copy of rows and its GEMMs, on its threads."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights


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
    """Remap integers into the buffers."""
    _check_support(hidden_states)
    token_at = torch.empty(topk_ids.numel(), dtype=torch.int64)
    used = _place_slots()(
        topk_ids.data_ptr(), topk_ids.dtype == torch.int64,
        0 if expert_map is None else expert_map.data_ptr(), 0 if expert_map is None else len(expert_map),
        *topk_ids.shape, len(tokens_per_expert),
        tokens_per_expert.data_ptr(), inv_permuted_idx.data_ptr(), token_at.data_ptr(),
    )  # fmt: skip
    for source, target in ((hidden_states, rows), (hidden_states_scales, scales)):
        if source is not None and target is not None:
            torch.index_select(source, 0, token_at[:used], out=target[:used])
            target[used:].zero_()


def launch_experts(
    rows: torch.Tensor, tokens_per_expert: torch.Tensor, weights: ExpertsWeights, spec: ExpertsSpec, out: torch.Tensor
) -> None:
    """Run one expert after the other on its rows, into ``out``."""
    _check_support(rows)
    gate_up, down = (
        weight if spec.transposed else weight.transpose(1, 2) for weight in (weights.gate_up_proj, weights.down_proj)
    )
    start = 0
    for expert, count in enumerate(tokens_per_expert.tolist()):
        if count > 0:
            values = torch.mm(rows[start : start + count], gate_up[expert])
            if weights.gate_up_bias is not None:
                values.add_(weights.gate_up_bias[expert])
            outputs = out[start : start + count]
            torch.mm(_activated(values, spec), down[expert], out=outputs)
            if weights.down_bias is not None:
                outputs.add_(weights.down_bias[expert])
            start += count


def _check_support(tensor: torch.Tensor) -> None:
    if not tensor.is_cpu:
        raise ValueError(f"impl='cpu' needs tensors on a CPU, got {tensor.device}; use impl='triton' or impl='auto'")


def _activated(gate_up: torch.Tensor, spec: ExpertsSpec) -> torch.Tensor:
    """``activation(gate) * (up + up_offset)`` in the dtype of the projection [rows, 2I]."""
    gate, up = (gate_up[:, 0::2], gate_up[:, 1::2]) if spec.interleaved else gate_up.chunk(2, dim=-1)
    if spec.activation_limit is not None:
        gate = gate.clamp(max=spec.activation_limit)
        up = up.clamp(-spec.activation_limit, spec.activation_limit)
    if spec.up_offset != 0.0:
        up = up + spec.up_offset
    if spec.activation != "silu":
        gate = torch.nn.functional.gelu(gate, approximate="tanh" if spec.activation == "gelu_tanh" else "none")
    elif spec.activation_alpha != 1.0:
        gate = gate * torch.sigmoid(spec.activation_alpha * gate)
    else:
        gate = torch.nn.functional.silu(gate)
    return gate * up


@functools.cache
def _place_slots() -> Callable[..., int]:
    from turnout.remap._cpu_kernel import place_slots

    return place_slots
