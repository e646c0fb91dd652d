"""The routers that turnout replaces: Gemma 4's, whose forward is set on each instance.

Norm, scale and projection stay the model's own, so that everything is rounded where the model rounds; softmax, top-k,
normalisation and per-expert scale become one `turnout.route`, which writes what reads the result at that call.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

from turnout.contracts import contracts
from turnout.integrations._transformers_experts import NAME
from turnout.integrations._transformers_layers import (
    Layer,
    forward_attribute,
    instance_forward,
    is_class_forward,
)
from turnout.integrations.compressed_tensors import QuantizedExperts
from turnout.routing.api import prepare, route_prepared
from turnout.spec import RouterSpec

RouterForward = Callable[[Any, torch.Tensor], tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]


def router_hindrance(layer: Layer) -> str | None:
    """Why a router is not replaced; None if it can be."""
    name = type(layer.router).__name__
    if not isinstance(layer.router, Gemma4TextRouter):
        return f"router class {name} is not replaced yet; {_known_spec(layer.config)}"
    if type(layer.router).forward is not Gemma4TextRouter.forward:
        return f"{name} has a forward of its own, which need not compute what Gemma4TextRouter does"
    if not is_class_forward(layer.router) and not is_router_replaced(layer.router):
        return "another tool has set a forward on this instance; apply turnout before it"
    return None


def _known_spec(config: Any) -> str:
    try:
        return f"what it computes is known: {RouterSpec.from_config(config)}"
    except ValueError:
        return "its config does not say its RouterSpec"


def is_router_replaced(router: nn.Module) -> bool:
    """Whether the instance runs a forward of this module."""
    return getattr(getattr(instance_forward(router), "__func__", None), "__module__", None) == __name__


def replace_router(layer: Layer) -> str:
    """Set the forward of a router without hindrance; ``"replaced"`` or ``"already replaced"``."""
    forward = _router_forward(RouterSpec.from_config(layer.config), fixed_consumer(layer.experts))
    if getattr(instance_forward(layer.router), "__func__", None) is forward:
        return "already replaced"
    setattr(layer.router, forward_attribute(layer.router), types.MethodType(forward, layer.router))
    return "replaced"


def restore_router(router: Any) -> None:
    """Give a replaced router the forward of its class again."""
    attribute = forward_attribute(router)
    if attribute == "forward":
        del router.forward
    else:
        setattr(router, attribute, types.MethodType(type(router).forward, router))


@functools.cache
def _router_forward(spec: RouterSpec, fixed: Consumer | None) -> RouterForward:
    declarations = {name: prepare(spec, contracts[name]) for name in _CONSUMER_NAMES}

    # The name "forward" lets a pickled bound method resolve to the class's own: the file needs no turnout.
    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Router of Gemma 4 on hidden states [T, H]; see `turnout.apply`."""
        if self.config.top_k_experts != spec.top_k:
            raise ValueError(
                f"config.top_k_experts is {self.config.top_k_experts} and was {spec.top_k} when turnout.apply(model) "
                "was called; call it again"
            )
        hidden_states = self.norm(hidden_states)
        hidden_states = hidden_states * self.scale * self.scalar_root_size
        router_logits = self.proj(hidden_states)

        # Read at each call: generate() changes the experts implementation between prefill and decode.
        implementation = self.config._experts_implementation
        consumer = fixed or consumer_of(implementation, router_logits.device.type)
        topk_weights, topk_ids = route_prepared(router_logits, declarations[consumer.name], self.per_expert_scale)

        probabilities = None
        if self._forward_hooks:
            probabilities = torch.softmax(router_logits, dim=-1, dtype=torch.float32)
        return probabilities, topk_weights, topk_ids

    return forward


class Consumer(NamedTuple):
    """The catalogue's entry for the experts that read a routing, and why it is that one."""

    name: str
    reason: str


_BY_IMPLEMENTATION = {
    None: Consumer("transformers.eager", "eager experts read int64 alone"),
    "eager": Consumer("transformers.eager", "eager experts read int64 alone"),
    "batched_mm": Consumer("transformers.batched_mm", "batched_mm indexes with the ids: int64 is not cast"),
    NAME: Consumer("turnout.transformers", "turnout's experts read ids of any dtype, so the short ones are written"),
}
_GROUPED_MM = Consumer(
    "transformers.grouped_mm",
    "grouped_mm counts the ids as int32; while generate() decodes with batched_mm, its int64 is written",
)
_GROUPED_MM_CPU = Consumer(
    "transformers.grouped_mm.cpu", "grouped_mm on a CPU casts ids of any dtype to float32, so int64 stays"
)
_WRAPPED = Consumer(
    "transformers.expert_parallel.all_to_all",
    "the experts are parallel, or their forward was replaced: every such wrapper takes int64",
)
_UNKNOWN = Consumer("transformers.eager", "not verified what this implementation reads: int64, as stock routers write")
_CONSUMER_NAMES = {
    consumer.name for consumer in (*_BY_IMPLEMENTATION.values(), _GROUPED_MM, _GROUPED_MM_CPU, _WRAPPED, _UNKNOWN)
}


def consumer_of(implementation: str | None, device_type: str) -> Consumer:
    """Who reads what a router hands to experts that run with this implementation on such a device."""
    if implementation == "grouped_mm":
        return _GROUPED_MM_CPU if device_type in ("cpu", "mps") else _GROUPED_MM
    return _BY_IMPLEMENTATION.get(implementation, _UNKNOWN)


def fixed_consumer(experts: nn.Module) -> Consumer | None:
    """Who reads the routing whatever the experts implementation; None where that decides."""
    if isinstance(experts, QuantizedExperts):
        return _BY_IMPLEMENTATION[NAME]
    if getattr(experts, "_is_expert_parallel", False) or not is_class_forward(experts):
        return _WRAPPED
    return None
