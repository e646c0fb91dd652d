"""What turnout does in each layer of vLLM, as rows, and folded for vLLM's log."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from turnout.contracts import Contract, dtype_name
from turnout.integrations import _vllm_modes as modes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One Mixture-of-Experts layer of vLLM.

    Attributes:
        layer: its name in the model.
        mode: ``"off"``, ``"routing"`` or ``"layer"``.
        router: the class of its router.
        state: ``"routed"``: turnout computes the routing. ``"strict"``: a custom function that turnout does not know
            does, and its result gets the consumer's form. ``"simulated"``: vLLM's simulator, likewise. ``"kept"``:
            vLLM's own router. ``"routes by itself"``: the experts route, and call no router. ``"off"``: the mode says
            so. ``"undecided"``: no forward pass has run.
        reason: why.
        consumer: the class that reads ids and weights; "" where no router is called.
        contract_name: its entry in `turnout.contracts`; None where there is none.
        contract: the form of the result; None where no router is called.
        impl: of `turnout.route`; "" where it does not run.
        experts: who runs the experts, in mode ``"layer"``; "" in the others, where it is always vLLM.
    """

    layer: str
    mode: str
    router: str
    state: str
    reason: str
    consumer: str = ""
    contract_name: str | None = None
    contract: Contract | None = None
    impl: str = ""
    experts: str = ""

    def __str__(self) -> str:
        read_by = ""
        if self.contract is not None:
            name = self.contract_name or self.consumer
            read_by = f" -> {name} {dtype_name(self.contract.ids_dtype)}"
        impl = f", impl {self.impl}" if self.impl else ""
        experts = f"; experts: {self.experts}" if self.experts else ""
        return f"{self.layer}: {self.router}{read_by}, {self.state}{impl} ({self.reason}){experts}"


class Explained(tuple[LayerRow, ...]):
    """One `LayerRow` for each layer, in the order of their making; prints with like layers folded."""

    __slots__ = ()

    def __str__(self) -> str:
        folded = Counter(dataclasses.replace(row, layer=re.sub(r"\b\d+\b", "*", row.layer)) for row in self)
        routed = sum(row.state == "routed" for row in self)
        lines = [f"turnout routes {routed} of {len(self)} Mixture-of-Experts layers"]
        return "\n".join([*lines, *(f"  {count} x {row}" for row, count in folded.items())])


def row_of(layer: Any) -> LayerRow:
    """The row of a layer that turnout is bound to."""
    mode, plan = modes.forced or layer.mode, layer.plan
    router = type(layer.router).__name__
    if mode == "off":
        return LayerRow(layer=layer.name, mode=mode, router=router, state="off", reason="the mode is off")
    if plan is None:
        return LayerRow(layer=layer.name, mode=mode, router=router, state="undecided", reason="no forward pass yet")
    row = LayerRow(
        layer=layer.name, mode=mode, router=router, state=plan.state, reason=plan.reason, impl=plan.impl,
        experts=_experts_of(layer) if mode == "layer" else "",
    )  # fmt: skip
    if plan.consumer is None:
        return row
    kind, name, contract, _ = plan.consumer
    return dataclasses.replace(row, consumer=kind, contract_name=name, contract=contract)


def _experts_of(layer: Any) -> str:
    hindrance = layer.few_tokens.hindrance
    return "turnout's for few tokens, vLLM's for more" if hindrance is None else f"vLLM's ({hindrance})"


def rows(layers: Iterable[Any]) -> Explained:
    """The rows of layers."""
    return Explained(row_of(layer) for layer in layers)


def log_summary(layers: Sequence[Any]) -> None:
    """Write the rows to vLLM's log, in one of its processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    logger().info("%s", rows(layers))


def log_step_aside(why: str, found: str) -> None:
    """Warn in vLLM's log that something stays as it is."""
    logger().warning("turnout %s, and leaves it alone: %s", why, found)


def logger() -> Any:
    """A logger under vLLM's, which its configuration shows."""
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.turnout")
