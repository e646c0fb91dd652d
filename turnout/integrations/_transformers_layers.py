"""The Mixture-of-Experts layers of a transformers model, and who has set a forward in them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

ROUTER_NAMES = ("router", "gate")


class Layer(NamedTuple):
    """A router and the experts that it serves."""

    path: str  # of the module that holds both
    router: Any
    experts: Any
    config: Any


def moe_layers(model: nn.Module) -> list[Layer]:
    """Every module with ``experts`` beside a ``router`` or ``gate``, in the model's order.

    Raises:
        TypeError: not a ``torch.nn.Module``.
        ValueError: there is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; load it with from_pretrained")
    layers = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        for name in ROUTER_NAMES:
            if name in children and "experts" in children:
                experts = children["experts"]
                config = getattr(experts, "config", getattr(model, "config", None))
                layers.append(Layer(path, children[name], experts, config))
    if not layers:
        raise ValueError(
            f"this {type(model).__name__} has no Mixture-of-Experts layer (a module with `experts` beside a "
            "`router` or `gate`), so there is nothing to replace; pass a Mixture-of-Experts model"
        )
    return layers


def uses_experts_interface(module: nn.Module) -> bool:
    """Whether transformers' ``use_experts_implementation`` decorates its class."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def instance_forward(module: nn.Module) -> Any:
    """The forward that was set on the instance; None where it runs that of its class."""
    return vars(module).get(forward_attribute(module))


def forward_attribute(module: nn.Module) -> str:
    """Where the instance keeps its forward: accelerate's hooks (device_map) wrap it and keep it as _old_forward."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def is_class_forward(module: nn.Module) -> bool:
    """Whether the instance runs the forward of its class."""
    forward = instance_forward(module)
    return forward is None or getattr(forward, "__func__", None) is type(module).forward
