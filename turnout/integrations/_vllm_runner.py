"""The hook: each ``MoERunner`` that vLLM makes is bound to turnout at the end of its constructor.

vLLM's registry for layers that others replace (``PluggableLayer.register_oot``) goes by the name of the class: runners
of other names (``TransformersMoERunner``, Kimi K3's) would stay unseen, a second tool that registers fails vLLM's
start, and LoRA no longer takes runners of those names. All of them call this constructor, alike in 0.26 to 0.32.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from turnout._version import __version__
from turnout.integrations._vllm_layer import RoutedLayer
from turnout.integrations._vllm_modes import configured_mode
from turnout.integrations._vllm_report import log_step_aside, log_summary

FUSED_MOE = "vllm.model_executor.layers.fused_moe."
NAME = "MoERunner"
# What turnout calls, overrides or reads: parameters by their order or by name, and attributes.
_SIGNATURES = {
    ("runner.moe_runner", "MoERunner.__init__"): ("layer_name", "moe_config", "router", "routed_experts"),
    ("runner.moe_runner", "MoERunner._apply_quant_method"): ("hidden_states", "router_logits"),
    ("router.base_router", "BaseRouter._select_experts"): (
        "hidden_states", "router_logits", "topk_indices_dtype", "input_ids",
    ),
    ("router.base_router", "BaseRouter._compute_routing"): (
        "hidden_states", "router_logits", "indices_type", "input_ids",
    ),
    ("router.base_router", "BaseRouter._apply_eplb_mapping"): ("topk_ids",),
    ("router.base_router", "BaseRouter._validate_eplb_state"): (),
    ("router.base_router", "BaseRouter.set_capture_fn"): ("capture_fn",),
    ("routed_experts", "RoutedExperts.forward_modular"): ("x", "topk_weights", "topk_ids"),
    ("routed_experts", "RoutedExperts.forward_monolithic"): ("x", "router_logits"),
    ("router.gate_linear", "GateLinear.forward"): ("x",),
}  # fmt: skip

_layers: list[weakref.ref[RoutedLayer]] = []


class Signature(NamedTuple):
    """A function of vLLM that the plugin builds on; ``found`` is None where there is none of that name."""

    name: str
    wanted: tuple[str, ...]
    found: tuple[str, ...] | None

    @property
    def is_known(self) -> bool:
        """Whether it starts with the parameters wanted."""
        return self.found is not None and self.found[: len(self.wanted)] == self.wanted

    def __str__(self) -> str:
        found = "not there" if self.found is None else f"({', '.join(self.found)})"
        return f"{self.name}: wanted ({', '.join(self.wanted)}, ...), found {found}"


def signatures() -> list[Signature]:
    """What the plugin builds on, as it is in the vLLM installed.

    Raises:
        ImportError: no vLLM is installed.
    """
    importlib.import_module("vllm")
    return [
        Signature(f"{module}.{name}", wanted, _parameters(module, name))
        for (module, name), wanted in _SIGNATURES.items()
    ]


def _parameters(module: str, name: str) -> tuple[str, ...] | None:
    try:
        value: Any = importlib.import_module(FUSED_MOE + module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ModuleNotFoundError, AttributeError):
        return None
    return tuple(inspect.signature(value).parameters)[1:]


def is_registered() -> bool:
    """Whether the runners that vLLM makes are bound."""
    return hasattr(stock_runner().__init__, "is_turnout")


def occupant() -> type | None:
    """The class that another tool has registered in place of vLLM's runner."""
    registry: dict[str, type] = importlib.import_module("vllm.model_executor.custom_op").op_registry_oot
    return registry.get(NAME)


def stock_runner() -> Any:
    """The class of vLLM, which those of some models derive from."""
    return importlib.import_module(FUSED_MOE + "runner.moe_runner").MoERunner


def register_runner() -> None:
    """Bind the runners that vLLM makes from now on. Those of another tool are left alone, which the log says."""
    call_after_init(stock_runner(), _bind_or_leave_alone)


def call_after_init(kind: Any, then: Callable[[Any], None]) -> None:
    """Let the constructor of a class of vLLM, which those of its subclasses call, end with a call on what it made."""
    constructor = kind.__init__

    @functools.wraps(constructor)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        then(self)

    construct.is_turnout = True  # type: ignore[attr-defined]
    kind.__init__ = construct


def _bind_or_leave_alone(runner: Any) -> None:
    if type(runner).__module__.startswith("vllm."):
        runner.turnout = bind(runner)
    else:
        _leave_alone(f"{type(runner).__module__}.{type(runner).__qualname__}")


@functools.cache
def _leave_alone(kind: str) -> None:
    log_step_aside("does not know an MoE runner", kind)


def bind(runner: Any) -> RoutedLayer:
    """Bind turnout to a runner of vLLM, in the mode of vLLM's configuration.

    Raises:
        ValueError: the mode configured is none.
    """
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    mode = configured_mode(config.additional_config)
    if isinstance(config.additional_config, dict):  # part of the name under which vLLM keeps compiled models
        config.additional_config.update(turnout=mode, turnout_version=__version__)
    layer = RoutedLayer(runner, mode, summarise)
    layer.install()
    _layers.append(weakref.ref(layer))
    return layer


def layers() -> list[RoutedLayer]:
    """The layers of this process that turnout is bound to, in the order of their making."""
    _layers[:] = [reference for reference in _layers if reference() is not None]
    return [layer for layer in (reference() for reference in _layers) if layer is not None]


def summarise() -> None:
    """Say once what was decided, when the last layer has been."""
    present = layers()
    if all(layer.plan is not None for layer in present) and not all(layer.reported for layer in present):
        for layer in present:
            layer.reported = True
        log_summary(present)
