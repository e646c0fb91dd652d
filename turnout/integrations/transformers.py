"""turnout in a loaded transformers model: `apply`, `restore` and `explain`.

The forward of each supported router is replaced on its instance. Norm, scale and projection stay the model's
own, so that everything is rounded where the model rounds; softmax, top-k, normalisation and per-expert scale
become one `turnout.route`, which writes what the experts implementation in force at that call reads.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from turnout.contracts import Contract, contracts, dtype_name
from turnout.routing.api import choose_impl, prepare, route_prepared
from turnout.spec import RouterSpec

RouterForward = Callable[[Any, torch.Tensor], tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterReport:
    """One Mixture-of-Experts layer of a model.

    Attributes:
        path: the router's name in the model.
        router: the router's class.
        state: ``"replaced"``, ``"already replaced"``, ``"restored"``, ``"stock"`` or ``"not supported"``.
        reason: why this contract and impl, or why the router is not replaced.
        experts_implementation: what transformers runs the experts with now; None for a router not supported.
        contract_name: the entry of `turnout.contracts` for it; None likewise.
        contract: what `route` writes for it; None likewise.
        impl: the implementation of `route` on the router's device; None likewise.
    """

    path: str
    router: str
    state: str
    reason: str
    experts_implementation: str | None = None
    contract_name: str | None = None
    contract: Contract | None = None
    impl: str | None = None


class Applied(tuple[RouterReport, ...]):
    """One `RouterReport` for each Mixture-of-Experts layer, in the model's order; prints with like layers folded."""

    __slots__ = ()

    def __str__(self) -> str:
        states = Counter(row.state for row in self)
        lines = [f"Mixture-of-Experts layers: {', '.join(f'{n} {state}' for state, n in states.items())}"]
        for row, count in Counter(_without_layer_number(row) for row in self).items():
            lines += ["", f"{row.path} x {count}", *_lines(row)]
        return "\n".join(lines)


def _without_layer_number(row: RouterReport) -> RouterReport:
    return dataclasses.replace(row, path=re.sub(r"\b\d+\b", "*", row.path))


def _lines(row: RouterReport) -> Iterator[str]:
    yield f"  router    {row.router}: {row.state}"
    if row.contract is not None:
        ids, weights = dtype_name(row.contract.ids_dtype), dtype_name(row.contract.weights_dtype)
        yield f"  experts   {row.experts_implementation}"
        yield f"  contract  {row.contract_name}: ids {ids}, weights {weights}"
        yield f"  impl      {row.impl}"
    yield f"  reason    {row.reason}"


def apply(model: nn.Module) -> Applied:
    """Let turnout route in every Gemma 4 Mixture-of-Experts layer of a loaded model.

    Parameters, state dict and configuration are untouched: a saved model reloads as a stock one. The new forward
    reads its parameters from the module at each call, and is for inference: it raises where the logits require
    grad. The probabilities [T, E] that a stock router returns first are computed only while the router has
    forward hooks (transformers' output recorders are such hooks), else that item is None. A second call changes
    nothing, unless the router's configuration or the experts' forward did; a compiled model recompiles.

    Args:
        model: any module that contains Gemma 4 decoder layers, a whole model or a part of one.

    Returns:
        One row for each layer: what was replaced, with contract, impl and reason. It can be printed.

    Raises:
        TypeError: not a ``torch.nn.Module``.
        ValueError: the model has no Mixture-of-Experts layer.
        NotImplementedError: it has some, but none with a router that turnout replaces yet.
    """
    layers = _moe_layers(model)
    if all(_hindrance(layer) for layer in layers):
        raise NotImplementedError(
            f"turnout.apply cannot replace the routers of this {type(model).__name__}: {_hindrance(layers[0])}. "
            "turnout.route can be called directly; turnout.explain(model) shows every layer."
        )
    return Applied(_apply(layer) for layer in layers)


def restore(model: nn.Module) -> Applied:
    """Give every router that `apply` replaced its own forward again; on a stock model nothing changes.

    Raises:
        TypeError, ValueError: as `apply`.
    """
    return Applied(_restore(layer) for layer in _moe_layers(model))


def explain(model: nn.Module) -> Applied:
    """What `apply` did, or would do, in each layer, with contract, impl and reason; changes nothing.

    Raises:
        TypeError, ValueError: as `apply`.
    """
    return Applied(_report(layer, _state(layer)) for layer in _moe_layers(model))


class _Layer(NamedTuple):
    """A router and the experts that it serves."""

    path: str
    router: Any
    experts: Any
    config: Any


def _moe_layers(model: nn.Module) -> list[_Layer]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; load it with from_pretrained")
    layers = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        for name in ("router", "gate"):
            if name in children and "experts" in children:
                experts = children["experts"]
                config = getattr(experts, "config", getattr(model, "config", None))
                layers.append(_Layer(f"{path}.{name}".lstrip("."), children[name], experts, config))
    if not layers:
        raise ValueError(
            f"this {type(model).__name__} has no Mixture-of-Experts layer (a module with `experts` beside a "
            "`router` or `gate`), so there is no routing to replace; pass a Mixture-of-Experts model"
        )
    return layers


def _hindrance(layer: _Layer) -> str | None:
    """Why the router is not replaced; None if it can be."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    name = type(layer.router).__name__
    if not isinstance(layer.router, Gemma4TextRouter):
        return f"router class {name} is not replaced yet; {_known_spec(layer.config)}"
    if type(layer.router).forward is not Gemma4TextRouter.forward:
        return f"{name} has a forward of its own, which need not compute what Gemma4TextRouter does"
    if _has_foreign_forward(layer.router):
        return "another tool has set a forward on this instance; apply turnout before it"
    return None


def _known_spec(config: Any) -> str:
    try:
        return f"what it computes is known: {RouterSpec.from_config(config)}"
    except ValueError:
        return "no RouterSpec is known for it either"


def _apply(layer: _Layer) -> RouterReport:
    if _hindrance(layer):
        return _report(layer, "not supported")
    forward = _router_forward(RouterSpec.from_config(layer.config), _are_experts_wrapped(layer.experts))
    if getattr(_instance_forward(layer.router), "__func__", None) is forward:
        return _report(layer, "already replaced")
    setattr(layer.router, _forward_attribute(layer.router), types.MethodType(forward, layer.router))
    return _report(layer, "replaced")


def _restore(layer: _Layer) -> RouterReport:
    state = _state(layer)
    if state != "replaced":
        return _report(layer, state)
    attribute = _forward_attribute(layer.router)
    if attribute == "forward":
        del layer.router.forward
    else:
        setattr(layer.router, attribute, types.MethodType(type(layer.router).forward, layer.router))
    return _report(layer, "restored")


def _state(layer: _Layer) -> str:
    if _hindrance(layer):
        return "not supported"
    return "replaced" if _is_ours(_instance_forward(layer.router)) else "stock"


def _report(layer: _Layer, state: str) -> RouterReport:
    row = RouterReport(path=layer.path, router=type(layer.router).__name__, state=state, reason="")
    hindrance = _hindrance(layer)
    if hindrance:
        return dataclasses.replace(row, reason=hindrance)
    weight = layer.router.proj.weight
    implementation = layer.config._experts_implementation
    consumer = _consumer(implementation, weight.device.type, _are_experts_wrapped(layer.experts))
    choice = choose_impl(weight, weight.shape[0])
    return dataclasses.replace(
        row,
        reason=f"{consumer.reason}; {choice.reason}",
        experts_implementation=implementation or "eager",
        contract_name=consumer.name,
        contract=contracts[consumer.name],
        impl=choice.impl,
    )


@functools.cache
def _router_forward(spec: RouterSpec, are_experts_wrapped: bool) -> RouterForward:
    declarations = {name: prepare(spec, contracts[name]) for name in _CONSUMER_NAMES}

    # The name "forward" lets a pickled bound method resolve to the class's own: the file needs no turnout.
    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Router of Gemma 4 on hidden states [T, H]; see `apply`."""
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
        consumer = _consumer(implementation, router_logits.device.type, are_experts_wrapped)
        topk_weights, topk_ids = route_prepared(router_logits, declarations[consumer.name], self.per_expert_scale)

        probabilities = None
        if self._forward_hooks:
            probabilities = torch.softmax(router_logits, dim=-1, dtype=torch.float32)
        return probabilities, topk_weights, topk_ids

    return forward


class _Consumer(NamedTuple):
    """The catalogue's entry for the experts that read a routing, and why it is that one."""

    name: str
    reason: str


_BY_IMPLEMENTATION = {
    None: _Consumer("transformers.eager", "eager experts read int64 alone"),
    "eager": _Consumer("transformers.eager", "eager experts read int64 alone"),
    "batched_mm": _Consumer("transformers.batched_mm", "batched_mm indexes with the ids: int64 is not cast"),
}
_GROUPED_MM = _Consumer(
    "transformers.grouped_mm",
    "grouped_mm counts the ids as int32; while generate() decodes with batched_mm, its int64 is written",
)
_GROUPED_MM_CPU = _Consumer(
    "transformers.grouped_mm.cpu", "grouped_mm on a CPU casts ids of any dtype to float32, so int64 stays"
)
_WRAPPED = _Consumer(
    "transformers.expert_parallel.all_to_all",
    "the experts are parallel, or their forward was replaced: every such wrapper takes int64",
)
_UNKNOWN = _Consumer("transformers.eager", "not verified what this implementation reads: int64, as stock routers write")
_CONSUMER_NAMES = {
    consumer.name for consumer in (*_BY_IMPLEMENTATION.values(), _GROUPED_MM, _GROUPED_MM_CPU, _WRAPPED, _UNKNOWN)
}


def _consumer(implementation: str | None, device_type: str, are_experts_wrapped: bool) -> _Consumer:
    if are_experts_wrapped:
        return _WRAPPED
    if implementation == "grouped_mm":
        return _GROUPED_MM_CPU if device_type in ("cpu", "mps") else _GROUPED_MM
    return _BY_IMPLEMENTATION.get(implementation, _UNKNOWN)


def _are_experts_wrapped(experts: nn.Module) -> bool:
    return getattr(experts, "_is_expert_parallel", False) or _has_foreign_forward(experts)


def _has_foreign_forward(module: nn.Module) -> bool:
    """Whether something else than the class or turnout set the forward that the instance runs."""
    forward = _instance_forward(module)
    is_own = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not is_own and not _is_ours(forward)


def _is_ours(forward: Any) -> bool:
    return getattr(getattr(forward, "__func__", None), "__module__", None) == __name__


def _instance_forward(module: nn.Module) -> Any:
    return vars(module).get(_forward_attribute(module))


def _forward_attribute(module: nn.Module) -> str:
    """Where the instance keeps its forward: accelerate's hooks (device_map) wrap it and keep it as _old_forward."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"
