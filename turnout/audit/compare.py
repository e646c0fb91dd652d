"""Two reports side by side: before and after a change."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from turnout.audit.report import AuditReport
from turnout.audit.rules import REDUNDANT, CopyKind


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity in both reports, per call of its phase.

    Attributes:
        phase: "prefill", "decode" or what the calls were named.
        what: a class of copies, redundant copies in a region, or what `unit` counts.
        unit: "copies", "operators" or "us" (microseconds of device time).
        before, after: the quantity.
    """

    phase: str
    what: str
    unit: str
    before: float
    after: float


def compare(before: AuditReport, after: AuditReport) -> list[Row]:
    """What changed, phase by phase: copies, operators, and device time where both reports measured it.

    Raises:
        ValueError: the reports have no phase in common.
    """
    names = [[phase.name for phase in report.phases] for report in (before, after)]
    phases = [name for name in names[0] if name in names[1]]
    if not phases:
        raise ValueError(
            f"the reports share no phase: {', '.join(names[0])} before, {', '.join(names[1])} after; "
            "audit the same calls twice"
        )
    rows = []
    for phase in phases:
        quantities = [_quantities(report, phase) for report in (before, after)]
        for what, unit in quantities[0]:
            if (what, unit) in quantities[1]:
                values = [known[what, unit] for known in quantities]
                if any(values):
                    rows.append(Row(phase, what, unit, *values))
    return rows


def _quantities(report: AuditReport, phase: str) -> dict[tuple[str, str], float]:
    """Quantities of one phase per call, by name and unit."""
    size = next(p for p in report.phases if p.name == phase)
    found = {}
    for region in report.regions:
        found[f"redundant in {region}", "copies"] = report.per_call(*REDUNDANT, region=region)[phase]
    for kind in CopyKind:
        found[kind.value, "copies"] = report.per_call(kind)[phase]
    found["operators", "operators"] = size.operators / size.calls
    for timed in report.device_time.phases if report.device_time is not None else ():
        if timed.name == phase:
            found["copies, device time", "us"] = timed.copy_us
    return found


def table(before: AuditReport, after: AuditReport) -> Table:
    """`compare` for the terminal."""
    shown = Table(title=f"before: {before.target}   after: {after.target}, per call", title_justify="left")
    for name in ("phase", "what", "before", "after", "change"):
        shown.add_column(name, justify="left" if name in ("phase", "what") else "right")
    for row in compare(before, after):
        change = row.after - row.before
        style = "green" if change < 0 else "red" if change > 0 else "dim"
        cells = (f"{row.before:g}", f"{row.after:g}", Text(f"{change:+g}" if change else "0", style=style))
        shown.add_row(row.phase, row.what, *cells)
    return shown
