"""The operators ``turnout::experts`` and ``turnout::experts_out``, as torch's dispatcher, compiler and export see them.

The spec travels as its key, a line of JSON: an exported graph holds all it needs and no handle into this process.
``structures`` are those of `turnout.Routing` in its order, or none at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from turnout.impls import check_apart, launch_of, module_of
from turnout.operators import operator
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing

_INPUTS = (
    "Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, "
    "Tensor? gate_up_scale, Tensor? down_scale, Tensor topk_weights, Tensor topk_ids, Tensor?[] structures, "
    "str spec, str impl, bool batch_invariant"
)

_spec_of = functools.cache(ExpertsSpec.from_key)
_NUM_WEIGHTS = len(ExpertsWeights._fields)


def _allocate(hidden_states: torch.Tensor, *_: object) -> torch.Tensor:
    num_tokens, hidden_size = hidden_states.shape
    return torch.empty_strided(
        (num_tokens, hidden_size), (hidden_size, 1), dtype=hidden_states.dtype, device=hidden_states.device
    )


@operator(f"turnout::experts({_INPUTS}) -> Tensor", _allocate)
def experts(hidden_states: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """The experts' sum in a new buffer."""
    out = _allocate(hidden_states)
    _run(hidden_states, arguments, out)
    return out


@operator(f"turnout::experts_out({_INPUTS}, *, Tensor(a!) out) -> ()", lambda *_, out: None)
def experts_out(hidden_states: torch.Tensor, *arguments: Any, out: torch.Tensor) -> None:
    """The experts' sum in the buffer given."""
    check_apart(out, "hidden_states", hidden_states)
    _run(hidden_states, arguments, out)


def _run(hidden_states: torch.Tensor, arguments: tuple[Any, ...], out: torch.Tensor) -> None:
    """Call the implementation; ``arguments`` are those of the schema from gate_up_proj on."""
    topk_weights, topk_ids, structures, spec, impl, batch_invariant = arguments[_NUM_WEIGHTS:]
    spec = _spec_of(spec)
    weights, routing = ExpertsWeights(*arguments[:_NUM_WEIGHTS]), Routing(topk_weights, topk_ids, *structures)
    _launch_of(impl, spec.quantization != "none", batch_invariant)(hidden_states, weights, routing, spec, out)


@functools.cache
def _launch_of(impl: str, is_quantized: bool, batch_invariant: bool) -> Callable[..., None]:
    """The function that runs an implementation; one not batch-invariant by itself has a second function that is."""
    if is_quantized:
        impl = f"_{impl}_quantized"
    name = "launch_batch_invariant"
    if not batch_invariant or not hasattr(module_of("experts", impl), name):
        name = "launch"
    return launch_of("experts", impl, name)
