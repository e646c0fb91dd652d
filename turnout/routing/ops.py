"""The operators ``turnout::route`` and ``turnout::route_out``, as torch's dispatcher, compiler and export see them.

Spec and contract travel as one string, two lines of JSON: an exported graph holds all it needs and no handle into this
process. Which implementation runs is an argument, so that a compiled graph runs what eager code ran.
"""

from __future__ import annotations

import functools

import torch

from turnout.contracts import Contract
from turnout.impls import launch_of
from turnout.operators import operator
from turnout.routing.inputs import RoutingTensors
from turnout.spec import RouterSpec

_SEPARATOR = "\n"
# The tensors of `RoutingTensors`; callers leave away those at the end that most routers have not, to save time.
INPUTS = (
    "Tensor router_logits, str declarations, str impl, "
    "Tensor? per_expert_scale=None, Tensor? is_padding=None, Tensor? num_valid_tokens=None, Tensor? expert_map=None, "
    "Tensor? e_score_correction_bias=None, Tensor? input_ids=None, Tensor? given_ids=None, "
    "Tensor? logical_to_physical_map=None, Tensor? logical_replica_count=None"
)
_BUFFERS = (
    "Tensor? record_load=None, Tensor? num_counted_tokens=None, Tensor(c!)? expert_load=None, "
    "Tensor(d!)? replay_ids=None, Tensor(a!) topk_weights, Tensor(b!) topk_ids"
)


def declarations(spec: RouterSpec, contract: Contract) -> str:
    """Spec and contract as the string that the operators take."""
    return spec.key + _SEPARATOR + contract.key


@functools.cache
def declared(declarations: str) -> tuple[RouterSpec, Contract]:
    """Spec and contract out of that string."""
    spec_key, contract_key = declarations.split(_SEPARATOR)
    return RouterSpec.from_key(spec_key), Contract.from_key(contract_key)


_launch_of = functools.cache(functools.partial(launch_of, "routing"))


def allocate(router_logits: torch.Tensor, spec: RouterSpec, contract: Contract) -> tuple[torch.Tensor, torch.Tensor]:
    """Buffers for weights and ids."""
    shape, strides, device = (router_logits.shape[0], spec.top_k), (spec.top_k, 1), router_logits.device
    return (  # empty_strided is the cheapest way to a new tensor
        torch.empty_strided(shape, strides, dtype=contract.weights_dtype, device=device),
        torch.empty_strided(shape, strides, dtype=contract.ids_dtype, device=device),
    )


def _route_fake(router_logits: torch.Tensor, declarations: str, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return allocate(router_logits, *declared(declarations))


@operator(f"turnout::route({INPUTS}) -> (Tensor topk_weights, Tensor topk_ids)", _route_fake)
def route(
    router_logits: torch.Tensor,
    declarations: str,
    impl: str,
    *tensors: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids in new buffers."""
    spec, contract = declared(declarations)
    topk_weights, topk_ids = allocate(router_logits, spec, contract)
    _launch_of(impl)(router_logits, spec, contract, RoutingTensors(*tensors), topk_weights, topk_ids)
    return topk_weights, topk_ids


@operator(f"turnout::route_out({INPUTS}, *, {_BUFFERS}) -> ()", lambda *_, **buffers: None)
def route_out(
    router_logits: torch.Tensor,
    declarations: str,
    impl: str,
    *tensors: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    **buffers: torch.Tensor | None,
) -> None:
    """Weights and ids in the buffers given; load and replay in theirs."""
    spec, contract = declared(declarations)
    _launch_of(impl)(router_logits, spec, contract, RoutingTensors(*tensors, **buffers), topk_weights, topk_ids)
