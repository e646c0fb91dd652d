"""The operators of this room, as torch's dispatcher, compiler and export see them.

``turnout::remap`` and ``turnout::remap_out`` copy rows to their experts; ``turnout::remapped_experts`` runs the experts
on them. Which implementation runs is an argument, so that a compiled graph runs what eager code ran.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from turnout.impls import launch_of
from turnout.operators import operator
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights

_REMAP_INPUTS = (
    "Tensor hidden_states, Tensor topk_ids, int num_experts, str impl, Tensor? expert_map, Tensor? hidden_states_scales"
)
_EXPERTS_INPUTS = (
    "Tensor rows, Tensor tokens_per_expert, str spec, str impl, Tensor gate_up_proj, Tensor down_proj, "
    "Tensor? gate_up_bias, Tensor? down_bias"
)
_RESULTS = "Tensor rows, Tensor tokens_per_expert, Tensor inv_permuted_idx, Tensor scales"
_BUFFERS = "Tensor(a!) rows, Tensor(b!) tokens_per_expert, Tensor(c!) inv_permuted_idx, Tensor(d!)? scales"

_spec_of = functools.cache(ExpertsSpec.from_key)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _allocate(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, *further: Any
) -> tuple[torch.Tensor, ...]:
    """Buffers for the results; where there are no scales, theirs has no columns."""
    (num_tokens, top_k), device, scales = topk_ids.shape, hidden_states.device, further[-1]
    slots = num_tokens * top_k
    counts, columns = torch.int32, 0 if scales is None else scales.shape[1]
    return (
        torch.empty((slots, hidden_states.shape[1]), dtype=hidden_states.dtype, device=device),
        torch.empty((num_experts,), dtype=counts, device=device),
        torch.empty((num_tokens, top_k), dtype=counts, device=device),
        torch.empty((slots, columns), dtype=hidden_states.dtype if scales is None else scales.dtype, device=device),
    )


@operator(f"turnout::remap({_REMAP_INPUTS}) -> ({_RESULTS})", _allocate)
def remap(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    impl: str,
    expert_map: torch.Tensor | None,
    hidden_states_scales: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Rows, counts, order and scales in new buffers."""
    out = _allocate(hidden_states, topk_ids, num_experts, hidden_states_scales)
    _run(impl, (hidden_states, topk_ids, expert_map, hidden_states_scales), out)
    return out


@operator(f"turnout::remap_out({_REMAP_INPUTS}, *, {_BUFFERS}) -> ()", lambda *_, **out: None)
def remap_out(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    impl: str,
    *optional: torch.Tensor | None,
    **out: torch.Tensor | None,
) -> None:
    """Rows, counts, order and scales in the buffers given."""
    _run(impl, (hidden_states, topk_ids, *optional), (*out.values(),))


def _run(impl: str, inputs: tuple[torch.Tensor | None, ...], out: tuple[torch.Tensor | None, ...]) -> None:
    """Call the implementation on rows and scales as integers of their size: bits are copied, whatever they mean."""
    hidden_states, topk_ids, expert_map, scales = inputs
    rows, tokens_per_expert, inv_permuted_idx, out_scales = out
    launch_of("remap", impl)(
        _as_integers(hidden_states), topk_ids, expert_map, _as_integers(scales),
        _as_integers(rows), tokens_per_expert, inv_permuted_idx, None if scales is None else _as_integers(out_scales),
    )  # fmt: skip


def _as_integers(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.view(_INTEGERS[tensor.dtype.itemsize])


def _like_rows(rows: torch.Tensor, *_: object) -> torch.Tensor:
    out: torch.Tensor = torch.empty_like(rows, memory_format=torch.contiguous_format)
    return out


@operator(f"turnout::remapped_experts({_EXPERTS_INPUTS}) -> Tensor", _like_rows)
def remapped_experts(
    rows: torch.Tensor, tokens_per_expert: torch.Tensor, spec: str, impl: str, *weights: Any
) -> torch.Tensor:
    """The experts' outputs, row for row, in a new buffer."""
    out = _like_rows(rows)
    launch_of("remap", impl, "launch_experts")(rows, tokens_per_expert, ExpertsWeights(*weights), _spec_of(spec), out)
    return out
