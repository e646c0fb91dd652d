"""turnout in a loaded transformers model: `apply`, `restore` and `explain`; `register` for ``from_pretrained``.

Routers get a new forward on the instance, experts another experts implementation, named ``"turnout"``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from turnout.contracts import contracts
from turnout.experts.api import choose_impl as choose_experts_impl
from turnout.impls import Choice
from turnout.integrations._transformers_layers import Layer, moe_layers
from turnout.integrations._transformers_report import Applied, ExpertsReport, LayerReport, RouterReport
from turnout.routing.api import choose_impl as choose_routing_impl

__all__ = ["Applied", "ExpertsReport", "LayerReport", "RouterReport", "apply", "explain", "register", "restore"]


def register() -> None:
    """Make ``experts_implementation="turnout"`` known to transformers, in this process.

    Then ``from_pretrained(..., experts_implementation="turnout")`` and ``model.set_experts_implementation("turnout")``
    run the experts of a model with `turnout.experts`, and leave its routers alone. `apply` does this by itself.
    Experts that compute what `turnout.ExpertsSpec` does not express raise at their first call.
    """
    from turnout.integrations import _transformers_experts

    _transformers_experts.register()


def apply(model: nn.Module, *, experts: bool = True) -> Applied:
    """Let turnout route, and run the experts, in every Mixture-of-Experts layer of a loaded model.

    Routers: those of Gemma 4. The new forward reads its parameters from the module at each call, and writes what the
    experts implementation in force at that call reads. The probabilities [T, E] that a stock router returns first are
    computed only while the router has forward hooks (transformers' output recorders are such hooks), else that item is
    None. Routers of other families stay.

    Experts: all those of transformers' experts interface that `turnout.ExpertsSpec` expresses. They are run as
    transformers runs any: the configuration says ``experts_implementation="turnout"``, in prefill and in decode.

    Parameters and state dict are untouched: a saved model reloads as a stock one. It is for inference: with gradients
    on, it raises. A second call changes nothing, unless the model did; a compiled model recompiles.

    Args:
        model: any module that contains Mixture-of-Experts layers, a whole model or a part of one.
        experts: False leaves the experts as they are, and replaces routers alone.

    Returns:
        One row for each layer: what was replaced, with contract, impl and reason. It can be printed.

    Raises:
        TypeError: not a ``torch.nn.Module``.
        ValueError: the model has no Mixture-of-Experts layer.
        NotImplementedError: it has some, but none of which turnout replaces anything.
    """
    layers = _examined(model)
    if all(layer.router_hindrance and (layer.experts_hindrance or not experts) for layer in layers):
        first = layers[0]
        why = first.router_hindrance if not experts else f"{first.router_hindrance}; {first.experts_hindrance}"
        raise NotImplementedError(
            f"turnout.apply replaces nothing in this {type(model).__name__}: {why}. turnout.route and turnout.experts "
            "can be called directly; turnout.explain(model) shows every layer."
        )
    experts_states = [_experts_state(layer) for layer in layers]
    if experts and set(experts_states) != {"not supported"}:
        from turnout.integrations._transformers_experts import replace_experts

        replace_experts(model)
    after = {"stock": "replaced", "replaced": "already replaced"} if experts else {}
    return Applied(
        _report(layer, _apply_router(layer), after.get(state, state))
        for layer, state in zip(layers, experts_states, strict=True)
    )


def restore(model: nn.Module) -> Applied:
    """Give every router that `apply` replaced its own forward again, and all experts the implementation before.

    On a stock model nothing changes. An experts implementation that was set after `apply` stays, too.

    Raises:
        TypeError, ValueError: as `apply`.
    """
    from turnout.integrations._transformers_experts import restore_experts

    layers = _examined(model)
    states = [(_restore_router(layer), _experts_state(layer)) for layer in layers]
    restore_experts(model)
    return Applied(
        _report(layer, router_state, "restored" if state == "replaced" != _experts_state(layer) else state)
        for layer, (router_state, state) in zip(layers, states, strict=True)
    )


def explain(model: nn.Module) -> Applied:
    """What `apply` did, or would do, in each layer, with contract, impl and reason; changes nothing.

    Raises:
        TypeError, ValueError: as `apply`.
    """
    return Applied(_report(layer, _router_state(layer), _experts_state(layer)) for layer in _examined(model))


class _Examined(NamedTuple):
    """A layer, and why its parts are not replaced; None where they can be."""

    layer: Layer
    router_hindrance: str | None
    experts_hindrance: str | None


def _examined(model: nn.Module) -> list[_Examined]:
    layers = moe_layers(model)
    from turnout.integrations._transformers_experts import experts_hindrances
    from turnout.integrations._transformers_router import router_hindrance

    hindrances = experts_hindrances([layer.experts for layer in layers])
    return [_Examined(layer, router_hindrance(layer), each) for layer, each in zip(layers, hindrances, strict=True)]


def _router_state(examined: _Examined) -> str:
    from turnout.integrations._transformers_router import is_router_replaced

    if examined.router_hindrance:
        return "not supported"
    return "replaced" if is_router_replaced(examined.layer.router) else "stock"


def _apply_router(examined: _Examined) -> str:
    from turnout.integrations._transformers_router import replace_router

    return "not supported" if examined.router_hindrance else replace_router(examined.layer)


def _restore_router(examined: _Examined) -> str:
    from turnout.integrations._transformers_router import restore_router

    state = _router_state(examined)
    if state != "replaced":
        return state
    restore_router(examined.layer.router)
    return "restored"


def _experts_state(examined: _Examined) -> str:
    from turnout.integrations._transformers_experts import is_implementation_of

    if examined.experts_hindrance:
        return "not supported"
    return "replaced" if is_implementation_of(examined.layer.experts) else "stock"


def _report(examined: _Examined, router_state: str, experts_state: str) -> LayerReport:
    return LayerReport(
        path=examined.layer.path,
        router=_router_report(examined, router_state),
        experts=_experts_report(examined, experts_state),
    )


def _router_report(examined: _Examined, state: str) -> RouterReport:
    from turnout.integrations._transformers_experts import NAME
    from turnout.integrations._transformers_router import consumer_of, fixed_consumer

    _, router, experts, config = examined.layer
    kind = type(router).__name__
    if examined.router_hindrance:
        return RouterReport(kind=kind, state=state, reason=examined.router_hindrance)
    # A replaced router writes for the experts in force; of another one it is told what `apply` would make it write.
    is_in_force = "replaced" in state or examined.experts_hindrance
    implementation = config._experts_implementation if is_in_force else NAME
    weight = router.proj.weight
    consumer = fixed_consumer(experts) or consumer_of(implementation, weight.device.type)
    choice = choose_routing_impl(weight, weight.shape[0])
    return RouterReport(
        kind=kind,
        state=state,
        reason=f"{consumer.reason}; {choice.reason}",
        contract_name=consumer.name,
        contract=contracts[consumer.name],
        impl=choice.impl,
    )


def _experts_report(examined: _Examined, state: str) -> ExpertsReport:
    from turnout.integrations._transformers_experts import experts_spec
    from turnout.integrations._transformers_layers import uses_experts_interface

    experts = examined.layer.experts
    kind = type(experts).__name__
    implementation = None
    if uses_experts_interface(experts):
        implementation = experts.config._experts_implementation or "eager"
    if examined.experts_hindrance:
        return ExpertsReport(kind=kind, state=state, reason=examined.experts_hindrance, implementation=implementation)
    choice = _experts_choice(experts.down_proj)
    return ExpertsReport(
        kind=kind,
        state=state,
        reason=choice.reason,
        implementation=implementation,
        spec=experts_spec(experts),
        impl=choice.impl,
    )


def _experts_choice(weight: torch.Tensor) -> Choice:
    """What runs for few tokens and for many."""
    few, many = (choose_experts_impl(weight.new_empty((tokens, 0)), 1, len(weight)) for tokens in (1, 1 << 20))
    if few == many:
        return few
    return Choice(f"{few.impl}, {many.impl}", f"{few.reason}; {many.reason}")
