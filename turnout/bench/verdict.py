"""What a table of scenarios shows, in words: what changed with turnout, by how much, and why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from turnout.bench.scenarios import Row, Scenario


class Change(NamedTuple):
    """A relative change: median of paired differences, with the 95% interval of that median."""

    median: float
    interval: tuple[float, float] | None  # None: too few differences for one

    @property
    def direction(self) -> str:
        """``"shorter"`` or ``"longer"`` where the interval leaves zero out; else ``"level"`` or ``"unknown"``."""
        if self.interval is None:
            return "unknown"
        lower, upper = self.interval
        return "shorter" if upper < 0 else "longer" if lower > 0 else "level"

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.median:+.1%}"
        lower, upper = self.interval
        return f"{self.median:+.1%} ({lower:+.1%} to {upper:+.1%})"


class Comparison(NamedTuple):
    """Time of one forward with turnout, relative to stock: -0.1 is 10% less."""

    scenario: Scenario
    stock: str  # the variant compared with
    turnout: str
    time: Change


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """The fastest turnout variant against the fastest stock variant, in each scenario."""
    comparisons = []
    for _, group in groupby(rows, key=lambda row: row.scenario):
        variants = list(group)
        stock, turnout = (_fastest(variants, name) for name in ("stock", "turnout"))
        comparisons.append(compare_rows(stock, turnout))
    return comparisons


def compare_rows(stock: Row, turnout: Row) -> Comparison:
    """Two variants in one scenario, round by round."""
    pairs = zip(stock.seconds, turnout.seconds, strict=True)
    change = change_of([after / before - 1 for before, after in pairs])
    return Comparison(stock.scenario, stock.variant, turnout.variant, change)


def change_of(differences: Sequence[float]) -> Change:
    """Median of paired differences, and its interval from order statistics, which assumes no distribution.

    The interval exists from 6 differences on: with 5, even smallest to largest covers the median in 94% of cases.
    """
    ordered = sorted(differences)
    n = len(ordered)
    below = [sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range(n)]  # P(at most k lie below the median)
    inner = sum(2 * p <= 0.05 for p in below)  # smallest and largest of an interval are the inner-th from each end
    interval = (ordered[inner - 1], ordered[n - inner]) if inner else None
    return Change(statistics.median(ordered), interval)


def verdict(rows: Sequence[Row], launches: str, time: str, why: str) -> str:
    """The table in plain words.

    Args:
        rows: the whole table.
        launches: what `Counts.launches` counts, in the plural: ``"operators"`` or ``"launches"``.
        time: what `Counts.copy_share` is a share of: ``"CPU time"`` or ``"device time"``.
        why: what turnout does in this engine, a clause.
    """
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.scenario)]
    before, after = ([_named(group, variant).counts for group in groups] for variant in ("stock", "turnout"))
    copies = _fewer([c.copies for c in before], [c.copies for c in after], "aten::copy_ calls")
    issued = _fewer([c.launches for c in before], [c.launches for c in after], launches)
    comparisons = compare(rows)
    text = f"With turnout a forward makes {copies} and {issued}: {why}. {_speed(comparisons)}"
    directions = {comparison.time.direction for comparison in comparisons}
    if not directions & {"shorter", "unknown"}:
        shares = f"{_range(c.copy_share for c in before)} before and {_range(c.copy_share for c in after)} now"
        text += f" So there is no gain in speed here: copies take little of the {time}, {shares}."
    return text


def _speed(comparisons: Sequence[Comparison]) -> str:
    heads = {
        "shorter": "shorter in",
        "longer": "longer in",
        "level": "the same within the spread in",
        "unknown": "open, as 6 rounds are the fewest that can tell, in",
    }
    parts = []
    for direction, head in heads.items():
        part = [comparison for comparison in comparisons if comparison.time.direction == direction]
        if part:
            parts.append(f"{head} {_listed(part)}")
    return f"Time of a forward, with 95% intervals: {'; '.join(parts)}."


def _range(shares: Iterable[float]) -> str:
    ordered = sorted(shares)
    return f"{ordered[0]:.1%} to {ordered[-1]:.1%}"


def _listed(comparisons: Iterable[Comparison]) -> str:
    return ", ".join(f"{_label(comparison)} {comparison.time}" for comparison in comparisons)


def _label(comparison: Comparison) -> str:
    """``decode x 16``, followed by what was compared where that is not stock with turnout."""
    scenario, stock, turnout, _ = comparison
    if stock.removeprefix("stock") == turnout.removeprefix("turnout"):
        return scenario.label + stock.removeprefix("stock")
    return f"{scenario.label} {turnout} against {stock}"


def _fewer(before: Sequence[int], after: Sequence[int], noun: str) -> str:
    """``12 fewer aten::copy_ calls (399 became 387)``; over the scenarios the range, with its largest case."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    if not any(differences):
        return f"as many {noun} as before"
    if min(differences) < 0 < max(differences):
        return f"from {-min(differences)} fewer to {max(differences)} more {noun}"
    sizes = sorted(abs(difference) for difference in differences)
    case = max(range(len(before)), key=lambda i: abs(differences[i]))
    amount = f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
    word = "fewer" if differences[case] < 0 else "more"
    return f"{amount} {word} {noun} ({before[case]} became {after[case]})"


def _named(rows: Iterable[Row], variant: str) -> Row:
    return next(row for row in rows if row.variant == variant)


def _fastest(rows: Iterable[Row], name: str) -> Row:
    return min((row for row in rows if row.variant.split()[0] == name), key=lambda row: row.median_seconds)
