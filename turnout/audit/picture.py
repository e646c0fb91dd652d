"""The dataflow of one layer, cut out of a recording: what the HTML page draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from turnout.audit import dtypes
from turnout.audit.graph import Graph, Op
from turnout.audit.rules import Classifier, CopyKind

_MOST_NODES = 140


@dataclass(frozen=True, slots=True)
class Node:
    """One operator.

    Attributes:
        op: operator index in the recording.
        label: its short name.
        detail: dtype and shape of its first result.
        module: path below the layer.
        kind: the class of a copy or wait; "" for an operator that computes.
        evidence: why it has that class.
    """

    op: int
    label: str
    detail: str
    module: str
    kind: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Picture:
    """Nodes in program order, and edges from a writer to its readers (positions in `nodes`).

    Attributes:
        layer: path of the module drawn.
        first, last: where in the layer the picture begins and ends, in words.
    """

    layer: str
    first: str
    last: str
    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Picture:
        """A picture from its JSON form."""
        nodes = tuple(Node(**node) for node in data["nodes"])
        return cls(data["layer"], data["first"], data["last"], nodes, tuple((a, b) for a, b in data["edges"]))


def draw(graph: Graph, classifier: Classifier) -> Picture | None:
    """One Mixture-of-Experts layer from its router to the end of its experts; else the busiest module.

    Returns:
        None where nothing ran inside a module.
    """
    window = _moe_window(graph) or _busiest_module(graph, classifier)
    if window is None:
        return None
    layer, ops = window
    position = {op.index: i for i, op in enumerate(ops)}
    nodes = tuple(_node(op, layer, classifier) for op in ops)
    edges = set()
    for op in ops:
        for view in op.reads:
            writer = graph.writer_of(view)
            if writer is not None and writer.index in position and writer.index != op.index:
                edges.add((position[writer.index], position[op.index]))
    first, last = (nodes[i].module or layer for i in (0, -1))
    return Picture(layer, first, last, nodes, tuple(sorted(edges)))


def _moe_window(graph: Graph) -> tuple[str, list[Op]] | None:
    """Operators of the first layer with experts, from the first one of its router to the last of its experts."""
    experts = next((op for op in graph if "experts" in op.module.split(".")), None)
    if experts is None:
        return None
    layer = experts.module.split(".experts")[0]
    inside = [op for op in graph if op.call == experts.call and _is_below(op.module, layer)]
    routers = [op.index for op in inside if op.module[len(layer) + 1 :].split(".")[0] in ("router", "gate")]
    of_experts = [op.index for op in inside if _is_below(op.module, f"{layer}.experts")]
    if not routers:
        return None
    ops = [op for op in inside if routers[0] <= op.index <= of_experts[-1]]
    return layer, ops[:_MOST_NODES]


def _busiest_module(graph: Graph, classifier: Classifier) -> tuple[str, list[Op]] | None:
    """The module with most redundant copies directly inside it."""
    counts: dict[str, int] = {}
    for index in classifier.copies:
        op = graph.ops[index]
        verdict = classifier.verdict(op)
        if op.module and verdict is not None:
            counts[op.module] = counts.get(op.module, 0) + (verdict.kind is not CopyKind.NEEDED)
    if not counts:
        return None
    module = max(counts, key=lambda name: counts[name])
    first = next(op for op in graph if op.module == module)
    ops = [op for op in graph if op.call == first.call and _is_below(op.module, module)]
    return module, ops[:_MOST_NODES]


def _is_below(module: str, layer: str) -> bool:
    return module == layer or module.startswith(f"{layer}.")


def _node(op: Op, layer: str, classifier: Classifier) -> Node:
    verdict = classifier.verdict(op)
    copy = classifier.copies.get(op.index)
    label, detail = op.packet.removeprefix("aten.").strip("_"), ""
    if op.results:
        view = op.results[0]
        shape = f"[{', '.join(map(str, view.shape))}]"
        detail = f"{_ABBREVIATED.get(view.dtype, dtypes.short_name(view.dtype))} {shape}"
        if copy is not None and copy.is_cast:
            source = copy.source.dtype
            label, detail = "cast", f"{_ABBREVIATED.get(source, dtypes.short_name(source))} \u2192 {detail}"
    return Node(
        op=op.index,
        label=label,
        detail=detail,
        module=op.module[len(layer) + 1 :],
        kind="" if verdict is None else verdict.kind.value,
        evidence="" if verdict is None else verdict.evidence,
    )


_ABBREVIATED = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
