"""Draws a layer's dataflow and a before / after chart as SVG."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from html import escape

from turnout.audit.compare import Row
from turnout.audit.picture import Node, Picture
from turnout.audit.rules import REDUNDANT, CopyKind

COLOURS = {
    CopyKind.DTYPE_MISMATCH: "#c62828",
    CopyKind.ROUND_TRIP: "#ad1457",
    CopyKind.REPEATED: "#e65100",
    CopyKind.LAYOUT: "#6a1b9a",
    CopyKind.HOST: "#1565c0",
    CopyKind.FUSABLE: "#2e7d32",
    CopyKind.NEEDED: "#607d8b",
    CopyKind.UNDECIDED: "#8d6e63",
}
_WIDTH, _HEIGHT = 172, 38  # of a node
_COLUMN, _ROW = 206, 54  # from one node to the next
_TOP, _LEFT = 56, 16
_FEWEST_IN_LANE = 4


def dataflow(picture: Picture, tip: str = "tip") -> str:
    """One layer, top to bottom: a column per module, a box per operator, redundant copies filled with colour.

    Args:
        picture: what to draw.
        tip: id of the arrow's tip, which no other drawing on the page may have.
    """
    at = _positions(picture)
    columns = list(dict.fromkeys(_lanes(picture)))
    width = _LEFT * 2 + (len(columns) - 1) * _COLUMN + _WIDTH
    height = _TOP + (max(row for _, row in at) + 1) * _ROW + 8
    parts = [
        f'<svg class="flow" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="Dataflow of {escape(picture.layer)}">',
        f'<defs><marker id="{tip}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="context-stroke"/></marker></defs>',
    ]
    for i, module in enumerate(columns):
        x = _LEFT + i * _COLUMN
        if i % 2 == 0:
            parts.append(f'<rect class="lane" x="{x - 17}" y="0" width="{_COLUMN}" height="{height}"/>')
        parts.append(f'<text class="module" x="{x + _WIDTH / 2}" y="24">{escape(module or picture.layer)}</text>')
    parts += [_edge(at[a], at[b], picture.nodes[a], picture.nodes[b], tip) for a, b in picture.edges]
    parts += [_box(node, place) for node, place in zip(picture.nodes, at, strict=True)]
    return "\n".join([*parts, "</svg>"])


def _positions(picture: Picture) -> list[tuple[int, int]]:
    """Column and row of each node: below everything that it reads, and below what its module ran before."""
    lanes = _lanes(picture)
    columns = {module: i for i, module in enumerate(dict.fromkeys(lanes))}
    reads = defaultdict(list)
    for writer, reader in picture.edges:
        reads[reader].append(writer)
    next_free: dict[int, int] = defaultdict(int)
    at: list[tuple[int, int]] = []
    for i, module in enumerate(lanes):
        column = columns[module]
        row = max([next_free[column], *(at[writer][1] + 1 for writer in reads[i] if writer < i)])
        next_free[column] = row + 1
        at.append((column, row))
    return at


def _lanes(picture: Picture) -> list[str]:
    """The module in whose column each node stands: its own, or its parent's if it has few nodes."""
    sizes = Counter(node.module for node in picture.nodes)
    lanes = []
    for node in picture.nodes:
        parent = node.module.rpartition(".")[0]
        lanes.append(parent if sizes[node.module] < _FEWEST_IN_LANE and sizes[parent] else node.module)
    return lanes


def _corner(place: tuple[int, int]) -> tuple[float, float]:
    return _LEFT + place[0] * _COLUMN, _TOP + place[1] * _ROW


def _edge(start: tuple[int, int], end: tuple[int, int], writer: Node, reader: Node, tip: str) -> str:
    (x0, y0), (x1, y1) = _corner(start), _corner(end)
    x0, y0, x1 = x0 + _WIDTH / 2, y0 + _HEIGHT, x1 + _WIDTH / 2
    redundant = next((node.kind for node in (writer, reader) if _is_redundant(node)), "")
    colour = COLOURS[CopyKind(redundant)] if redundant else "#90a4ae"
    if start[0] == end[0] and end[1] - start[1] > 1:  # past its neighbours, not through them
        side = x0 - _WIDTH / 2
        path = f"M{side + 8},{y0} C{side - 14},{y0 + 16} {side - 14},{y1 - 16} {side + 8},{y1}"
    else:
        bend = max(12.0, (y1 - y0) / 2)
        path = f"M{x0},{y0} C{x0},{y0 + bend} {x1},{y1 - bend} {x1},{y1}"
    width = 2.2 if redundant else 1.2
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" marker-end="url(#{tip})"/>'


def _is_redundant(node: Node) -> bool:
    return bool(node.kind) and CopyKind(node.kind) in REDUNDANT


def _box(node: Node, place: tuple[int, int]) -> str:
    x, y = _corner(place)
    fill, stroke, ink, tag = "#ffffff", "#90a4ae", "#263238", ""
    if node.kind:
        stroke = COLOURS[CopyKind(node.kind)]
        tag = f' <tspan class="kind">{escape(node.kind)}</tspan>'
        if _is_redundant(node):
            fill, ink = stroke, "#ffffff"
    dashed = "" if _is_redundant(node) or not node.kind else ' stroke-dasharray="4 3"'
    return (
        f"<g><title>{escape(node.evidence or node.label)}</title>"
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{fill}" stroke="{stroke}" '
        f'stroke-width="1.6"{dashed}/>'
        f'<text x="{x + 8}" y="{y + 16}" fill="{ink}" class="op">{escape(node.label)}{tag}</text>'
        f'<text x="{x + 8}" y="{y + 31}" fill="{ink}" class="detail">{escape(node.detail)}</text></g>'
    )


def before_after(rows: Sequence[Row]) -> str:
    """Pairs of bars, one pair per quantity."""
    bar, gap, label, chart = 13, 16, 240, 460
    scales: dict[tuple[str, str], float] = defaultdict(lambda: 1e-9)
    for row in rows:
        scales[row.phase, row.unit] = max(scales[row.phase, row.unit], row.before, row.after)
    colours = {kind.value: colour for kind, colour in COLOURS.items()}
    height = len(rows) * (2 * bar + gap) + 30
    parts = [
        f'<svg class="chart" width="{label + chart + 90}" height="{height}" role="img" aria-label="Before and after">',
        f'<text x="{label}" y="12" class="value">pale: before, full: after; per call, a scale for each unit</text>',
    ]
    for i, row in enumerate(rows):
        y = 24 + i * (2 * bar + gap)
        colour = colours.get(row.what, "#455a64")
        name = escape(f"{row.phase}: {row.what}" + (", us" if row.unit == "us" else ""))
        parts.append(f'<text x="{label - 10}" y="{y + bar + 4}" text-anchor="end">{name}</text>')
        for value, opacity, top in ((row.before, 0.35, y), (row.after, 1.0, y + bar)):
            width = chart * value / scales[row.phase, row.unit]
            parts.append(
                f'<rect x="{label}" y="{top}" width="{width:.1f}" height="{bar - 2}" fill="{colour}" '
                f'fill-opacity="{opacity}"/>'
                f'<text class="value" x="{label + width + 6:.1f}" y="{top + bar - 3}">{value:g}</text>'
            )
    return "\n".join([*parts, "</svg>"])
