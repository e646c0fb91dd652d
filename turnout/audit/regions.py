"""Named parts of a program, so that a budget can apply to the stretch that one cares for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

import torch

from turnout.audit.graph import Graph, Op
from turnout.audit.opset import COPY_PACKETS, is_gemm

_ROUTER_NAMES = ("router", "gate")


@dataclass(frozen=True, slots=True)
class Region:
    """A named part of the audited program.

    A point is a module pattern (``*`` matches any characters, dots included), with ``@gemm`` after it for the
    matrix products inside that module and the operators there that PyTorch does not own. Where several match, the
    region begins at the first, takes in the later ones, and ends at the first that matches `stop`.

    Attributes:
        name: what the report calls it.
        start: without `stop`, a module: the region is what runs inside. With `stop`, where the region begins.
        stop: where it ends, exclusive. Between the two points the region holds what depends on the values
            that the start wrote, and the copies that feed it; what merely runs in between is not in it.

    Examples:
        From the router's logits to the experts' first matrix product, in every layer:

        >>> Region("routing", start="*.router@gemm", stop="*.experts@gemm").name
        'routing'
    """

    name: str
    start: str
    stop: str | None = None

    def __post_init__(self) -> None:
        for point in filter(None, (self.start, self.stop)):
            _, at, what = point.partition("@")
            if at and what != "gemm":
                raise ValueError(f"a region's point must be a module pattern, or one followed by @gemm, got {point!r}")

    @classmethod
    def parse(cls, text: str) -> Region:
        """A region from ``NAME=START`` or ``NAME=START..STOP``.

        Examples:
            >>> Region.parse("routing=*.router@gemm..*.experts")
            Region(name='routing', start='*.router@gemm', stop='*.experts')
        """
        name, equals, points = text.partition("=")
        start, dots, stop = points.partition("..")
        if not (name and equals and start) or (dots and not stop):
            raise ValueError(f"a region must be NAME=START or NAME=START..STOP, got {text!r}")
        return cls(name, start, stop or None)


def members(graph: Graph, region: Region) -> set[int]:
    """Indices of the operators that a region holds."""
    if region.stop is None:
        return {op.index for op in graph if _is_at(op, region.start)}
    return set(_between(graph, region.start, region.stop))


def _between(graph: Graph, start: str, stop: str) -> Iterator[int]:
    tainted: set[int] | None = None
    copies: dict[int, Op] = {}
    for op in graph:
        if tainted is not None and _is_at(op, stop):
            tainted = None
        if tainted is None:
            if _is_at(op, start):
                tainted, copies = {view.storage for view in op.writes}, {}
                yield op.index
        elif _is_at(op, start) or any(view.storage in tainted for view in op.reads):
            tainted.update(view.storage for view in op.writes)
            yield op.index
            yield from _feeding(op, copies)
        elif op.packet in COPY_PACKETS:
            copies.update((view.storage, op) for view in op.writes)


def _feeding(op: Op, copies: dict[int, Op]) -> Iterator[int]:
    """Copies whose result an operator reads, and copies of copies."""
    for view in op.reads:
        copy = copies.pop(view.storage, None)
        if copy is not None:
            yield copy.index
            yield from _feeding(copy, copies)


def _is_at(op: Op, point: str) -> bool:
    pattern, at, _ = point.partition("@")
    return _is_inside(op.module, pattern) and (not at or is_gemm(op.packet) or op.is_opaque)


@lru_cache(maxsize=4096)
def _is_inside(module: str, pattern: str) -> bool:
    parts = module.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def moe_regions(model: torch.nn.Module) -> tuple[Region, ...]:
    """Regions of a model with Mixture-of-Experts layers, found by name: a router (or gate) beside its experts.

    Returns:
        "routing", from the router's logits to the call of the experts, and "experts", what runs inside them;
        empty for a model without such layers.
    """
    names = {name for name, _ in model.named_modules()}
    for name in sorted(names):
        parent, dot, last = name.rpartition(".")
        if last != "experts":
            continue
        for router in _ROUTER_NAMES:
            if f"{parent}{dot}{router}" in names:
                layer = fold(parent + dot)
                start, experts = f"{layer}{router}@gemm", f"{layer}experts"
                return Region("routing", start, experts), Region("experts", experts)
    return ()


def fold(path: str) -> str:
    """A module path with its layer numbers replaced by ``*``.

    Examples:
        >>> fold("model.layers.12.router.norm")
        'model.layers.*.router.norm'
    """
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
