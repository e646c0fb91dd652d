"""What `turnout.apply`, `restore` and `explain` return: a row for each layer, and how the rows print."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator

from turnout.contracts import Contract, dtype_name
from turnout.spec import ExpertsSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterReport:
    """The router of a layer.

    Attributes:
        kind: its class.
        state: ``"replaced"``, ``"already replaced"``, ``"restored"``, ``"stock"`` or ``"not supported"``.
        reason: why this contract and impl, or why it is not replaced.
        contract_name: the entry of `turnout.contracts` for who reads its result; None where it is not supported.
        contract: what `turnout.route` writes for that reader; None likewise.
        impl: the implementation of `turnout.route` on the router's device; None likewise.
    """

    kind: str
    state: str
    reason: str
    contract_name: str | None = None
    contract: Contract | None = None
    impl: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsReport:
    """The experts of a layer.

    Attributes:
        kind: their class.
        state: as of a `RouterReport`.
        reason: why this impl, or why they are not replaced.
        implementation: what transformers runs them with now; None where it has no choice.
        spec: what they compute; None where they are not supported.
        impl: the implementations of `turnout.experts` on their device, the one for few tokens first; None likewise.
    """

    kind: str
    state: str
    reason: str
    implementation: str | None = None
    spec: ExpertsSpec | None = None
    impl: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One Mixture-of-Experts layer of a model.

    Attributes:
        path: name in the model of the module that holds router and experts; "" for the model itself.
        router: its router.
        experts: its experts.
    """

    path: str
    router: RouterReport
    experts: ExpertsReport


class Applied(tuple[LayerReport, ...]):
    """One `LayerReport` for each Mixture-of-Experts layer, in the model's order; prints with like layers folded."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = [
            f"Mixture-of-Experts layers: {len(self)}; routers: {_counted(row.router.state for row in self)}; "
            f"experts: {_counted(row.experts.state for row in self)}"
        ]
        for row, count in Counter(_without_layer_number(row) for row in self).items():
            lines += ["", f"{row.path or 'the module itself'} x {count}", *_router_lines(row.router)]
            lines += _experts_lines(row.experts)
        return "\n".join(lines)


def _counted(states: Iterator[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in Counter(states).items())


def _without_layer_number(row: LayerReport) -> LayerReport:
    return dataclasses.replace(row, path=re.sub(r"\b\d+\b", "*", row.path))


def _router_lines(router: RouterReport) -> Iterator[str]:
    yield f"  router      {router.kind}: {router.state}"
    if router.contract is not None:
        ids, weights = dtype_name(router.contract.ids_dtype), dtype_name(router.contract.weights_dtype)
        yield f"    contract  {router.contract_name}: ids {ids}, weights {weights}"
        yield f"    impl      {router.impl}"
    yield f"    reason    {router.reason}"


def _experts_lines(experts: ExpertsReport) -> Iterator[str]:
    yield f"  experts     {experts.kind}: {experts.state}"
    if experts.implementation is not None:
        yield f"    run with  {experts.implementation}"
    if experts.spec is not None:
        yield f"    spec      {experts.spec}"
        yield f"    impl      {experts.impl}"
    yield f"    reason    {experts.reason}"
