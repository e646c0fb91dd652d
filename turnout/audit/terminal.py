"""The report in a terminal: a summary, then a tree by layer with identical layers folded."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from turnout.audit.device_time import DeviceTime
from turnout.audit.folding import across_phases, fold_layers
from turnout.audit.report import AuditReport, Finding
from turnout.audit.rules import REDUNDANT, CopyKind

STYLES = {
    CopyKind.DTYPE_MISMATCH: "bold red",
    CopyKind.ROUND_TRIP: "bold magenta",
    CopyKind.REPEATED: "bold yellow",
    CopyKind.LAYOUT: "bold cyan",
    CopyKind.HOST: "bold blue",
    CopyKind.FUSABLE: "green",
    CopyKind.NEEDED: "dim",
    CopyKind.UNDECIDED: "dim italic",
}
_MOST_MODULES_TIMED = 8


def show(report: AuditReport, console: Console | None = None) -> None:
    """Print a report.

    Args:
        report: what to show.
        console: where to; standard output unless given.
    """
    console = console or Console()
    console.print(_headline(report))
    if report.error:
        console.print(Text(f"The program raised {report.error}; what ran before is reported.", style="bold red"))
    console.print(_summary(report))
    tree = findings_tree(report.findings)
    if tree is not None:
        console.print(tree)
    if report.device_time is not None:
        console.print(device_time_table(report.device_time))
    for note in (*report.notes, *(report.device_time.notes if report.device_time else ())):
        console.print(Text(f"Not seen: {note}", style="yellow"))


def _headline(report: AuditReport) -> Text:
    count = report.redundant_count()
    noun = "copy" if count == 1 else "copies"
    style = "bold red" if count else "bold green"
    text = Text.assemble((f"{count} redundant {noun}", style), f" in {report.target}")
    calls = ", ".join(f"{p.calls} x {p.name} ({p.operators} operators)" for p in report.phases)
    return text.append(f"\n{calls}; torch {report.environment['torch']}, {report.environment['device']}", style="dim")


def _summary(report: AuditReport) -> Table:
    table = Table(title="Copies and waits, per call", title_justify="left")
    head, rows = summary(report)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for kinds, cells in rows:
        style = STYLES[kinds[0]] if len(kinds) == 1 else "bold"
        table.add_row(Text(cells[0], style=style), *cells[1:])
    return table


def summary(report: AuditReport) -> tuple[list[str], list[tuple[tuple[CopyKind, ...], list[str]]]]:
    """The table of classes, in words: what one call makes of each, by phase, and of these how many in each region.

    Returns:
        The head, and for each row the classes that it counts and its cells.
    """
    phases = [phase.name for phase in report.phases]
    head = ["class", *phases, *(f"in {region}" for region in report.regions), "bytes in all"]
    rows: list[tuple[tuple[CopyKind, ...], list[str]]] = []
    seen = [kind for kind in CopyKind if report.select(kind)]
    redundant = [(kind,) for kind in seen if kind in REDUNDANT]
    others = [(kind,) for kind in seen if kind not in REDUNDANT]
    for kinds in [*redundant, tuple(REDUNDANT), *others]:
        name = kinds[0].value if len(kinds) == 1 else "all redundant"
        cells = [name, *(f"{n:g}" for n in report.per_call(*kinds).values())]
        for region in report.regions:
            cells.append(" / ".join(f"{n:g}" for n in report.per_call(*kinds, region=region).values()))
        rows.append((kinds, [*cells, human_bytes(sum(f.bytes for f in report.select(*kinds)))]))
    return head, rows


def _total(findings: Iterable[Finding]) -> int:
    return sum(f.count for f in findings)


def human_bytes(count: int) -> str:
    """A number of bytes with a binary unit.

    Examples:
        >>> human_bytes(512), human_bytes(3 * 1024 * 1024)
        ('512 B', '3.0 MiB')
    """
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def findings_tree(findings: Sequence[Finding]) -> Tree | None:
    """A tree of findings by module; layers with the same findings share a branch.

    Returns:
        None where there is nothing to show.
    """
    root = Tree("By module", guide_style="dim")
    for label, below in fold_layers(findings):
        branch = root.add(Text(label, style="bold"))
        modules: dict[str, list[Finding]] = defaultdict(list)
        for f in below:
            modules[f.module].append(f)
        for module, members in modules.items():
            leaf = branch.add(escape(module)) if module else branch
            loud = [f for f in members if f.is_redundant or f.kind is CopyKind.HOST]
            for alike in across_phases(loud):
                leaf.add(_leaf(alike))
            quiet = Counter({kind: _total(f for f in members if f.kind is kind) for kind in CopyKind})
            quiet -= Counter({f.kind: quiet[f.kind] for f in loud})
            if quiet:
                leaf.add(Text("also " + ", ".join(f"{n} {kind.value}" for kind, n in quiet.items()), style="dim"))
    return root if root.children else None


def _leaf(alike: list[Finding]) -> Group:
    f = alike[0]
    what = "; ".join(f"{_moved(each)}{_times(each.count)} ({each.phase})" for each in alike)
    cast = f"{f.from_dtype} -> {f.to_dtype} " if f.is_cast else ""
    return Group(
        Text.assemble((f.kind.value, STYLES[f.kind]), f"  {cast}{what}"),
        Text(f"  {f.evidence}", style="dim"),
        Text(f"  {f.remedy}  ({f.source})"),
    )


def _moved(f: Finding) -> str:
    shape = f"[{', '.join(map(str, f.shape))}]"
    return shape if f.is_cast else f"{f.op.removeprefix('aten.').split('.')[0].strip('_')} {f.from_dtype} {shape}"


def _times(count: int) -> str:
    return f" x {count}" if count > 1 else ""


def device_time_table(times: DeviceTime) -> Table:
    """What copies cost, by phase and module."""
    table = Table(title=f"Copies in device time ({times.device}), per forward", title_justify="left")
    for name in ("phase / module", "copy_", "_to_copy", "copy kernels", "us", "share"):
        first = name.startswith("phase")
        table.add_column(name, justify="left" if first else "right", overflow="fold" if first else "ellipsis")
    for phase in times.phases:
        kernels = f"{phase.copy_kernels:g}" if times.device != "cpu" else "-"
        cells = (f"{phase.copy_calls:g}", f"{phase.to_copy_calls:g}", kernels, f"{phase.copy_us:.1f}")
        table.add_row(Text(phase.name, style="bold"), *cells, f"{phase.share:.1%}")
        for row in phase.modules[:_MOST_MODULES_TIMED]:
            where = " in ".join(filter(None, (row.inside, row.module or "outside any module")))
            table.add_row(f"  {where}", f"{row.calls:g}", "", "", f"{row.us:.1f}", "")
    return table
