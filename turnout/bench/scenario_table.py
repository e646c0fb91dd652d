"""The scenario table on a terminal, in the columns of vLLM's pull request 40565."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.table import Table

from turnout.bench.scenarios import Row


def scenario_table(
    rows: Sequence[Row],
    bits_per_byte: Mapping[str, float | None] | None = None,
    *,
    launches: str,
    title: str,
    columns: Mapping[str, Callable[[Row], str]] | None = None,
) -> Table:
    """Lay out rows, a block for each scenario.

    Args:
        rows: in the order to show.
        bits_per_byte: of each variant; None where it was not measured. Left out, there is no such column.
        launches: heading of `Counts.launches`.
        title: above the table.
        columns: further columns: heading, and what it says of a row.
    """
    further = dict(columns or {})
    if bits_per_byte is not None:
        further["bits/\nbyte"] = lambda row: _bits(bits_per_byte[row.variant])
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    for heading in ("scenario", "variant"):
        table.add_column(heading, no_wrap=True)
    for heading in ("copy_\ncalls", "copy_\ntime", launches, "tok/s", "TPOT\nms", "±", *further):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if row.scenario != previous:
            table.add_section()
        label = "" if row.scenario == previous else row.scenario.label
        table.add_row(label, *_cells(row), *(cell(row) for cell in further.values()))
        previous = row.scenario
    return table


def _bits(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.4f}"


def _cells(row: Row) -> tuple[str, ...]:
    lower, upper = row.quartile_seconds
    return (
        row.variant,
        str(row.counts.copies),
        f"{row.counts.copy_share:.1%}",
        str(row.counts.launches),
        f"{row.tokens_per_second:,.0f}",
        f"{row.median_seconds * 1e3:.2f}" if row.scenario.phase == "decode" else "",
        f"{(upper - lower) / 2 / row.median_seconds:.0%}",
    )
