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
    lower: float
    upper: float

    @property
    def is_measurable(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.lower > 0 or self.upper < 0


class Comparison(NamedTuple):
    """Time of one forward with turnout, relative to stock: -0.1 is 10% less."""

    scenario: Scenario
    stock: str  # the variant compared with
    turnout: str
    time: Change


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """The fastest turnout variant against the fastest stock variant, in each scenario."""
    comparisons = []
    for scenario, group in groupby(rows, key=lambda row: row.scenario):
        variants = list(group)
        stock, turnout = (_fastest(variants, name) for name in ("stock", "turnout"))
        pairs = zip(stock.seconds, turnout.seconds, strict=True)
        change = change_of([after / before - 1 for before, after in pairs])
        comparisons.append(Comparison(scenario, stock.variant, turnout.variant, change))
    return comparisons


def change_of(differences: Sequence[float]) -> Change:
    """Median of paired differences and its interval from order statistics, which assumes no distribution.

    With fewer than 6 differences no such interval reaches 95%: it is then the smallest to the largest.
    """
    ordered = sorted(differences)
    n = len(ordered)
    outside = 0  # how many to leave out at each end
    tail = 0.5**n  # chance that the true median lies beyond what is left out, one-sided
    while outside < n // 2:
        tail += math.comb(n, outside + 1) * 0.5**n
        if 2 * tail > 0.05:
            break
        outside += 1
    return Change(statistics.median(ordered), ordered[outside], ordered[n - 1 - outside])


def verdict(rows: Sequence[Row], launches: str, why: str) -> str:
    """The table in plain words.

    Args:
        rows: the whole table.
        launches: what ``Row.counts.launches`` counts, in the plural: ``"operators"`` or ``"kernel launches"``.
        why: what turnout does in this engine, to follow "because".
    """
    pairs = [
        (_named(group, "stock"), _named(group, "turnout"))
        for group in (list(g) for _, g in groupby(rows, key=lambda row: row.scenario))
    ]
    copies = _fewer([(a.counts.copies, b.counts.copies) for a, b in pairs], "aten::copy_ calls")
    issued = _fewer([(a.counts.launches, b.counts.launches) for a, b in pairs], launches)
    less = any(a.counts.copies > b.counts.copies or a.counts.launches > b.counts.launches for a, b in pairs)
    reason = f", because {why}" if less else f", although {why}"
    return f"With turnout a forward makes {copies} and {issued}{reason}. {_speed(compare(rows), pairs)}"


def _speed(comparisons: Sequence[Comparison], pairs: Sequence[tuple[Row, Row]]) -> str:
    faster = [c for c in comparisons if c.time.upper < 0]
    slower = [c for c in comparisons if c.time.lower > 0]
    level = [c for c in comparisons if not c.time.is_measurable]
    removed = max(a.counts.copy_share - b.counts.copy_share for a, b in pairs)
    sentences = []
    if faster:
        sentences.append(f"Faster: {_listed(faster)}.")
    if slower:
        sentences.append(f"Slower: {_listed(slower)}.")
    if level:
        sentences.append(f"No change that stands out of the spread: {_listed(level)}.")
    if not faster:
        share = f"copies lost at most {removed:.1%} of the time" if removed > 0 else "copies took no less of the time"
        sentences.append(f"So no gain in speed here ({share} in the profile).")
    return " ".join(sentences)


def _listed(comparisons: Iterable[Comparison]) -> str:
    return "; ".join(
        f"{c.scenario.label} {c.time.median:+.1%} ({c.time.lower:+.1%} to {c.time.upper:+.1%}{_against(c)})"
        for c in comparisons
    )


def _against(comparison: Comparison) -> str:
    """The pair, where it is not the plain one."""
    if (comparison.stock, comparison.turnout) == ("stock", "turnout"):
        return ""
    return f", {comparison.turnout} against {comparison.stock}"


def _fewer(pairs: Sequence[tuple[int, int]], noun: str) -> str:
    """``12 fewer aten::copy_ calls (389 -> 377)``, or the range over the scenarios."""
    fewer = [before - after for before, after in pairs]
    least, most = min(fewer), max(fewer)
    if least == most == 0:
        return f"as many {noun} as before"
    if least < 0 < most:
        return f"between {most} fewer and {-least} more {noun}"
    word = "fewer" if most > 0 else "more"
    low, high = sorted((abs(least), abs(most)))
    example = next(pair for pair, n in zip(pairs, fewer, strict=True) if abs(n) == high)
    amount = f"{low}" if low == high else f"{low} to {high}"
    return f"{amount} {word} {noun} (of {example[0]})"


def _named(rows: Iterable[Row], variant: str) -> Row:
    return next(row for row in rows if row.variant == variant)


def _fastest(rows: Iterable[Row], name: str) -> Row:
    return min((row for row in rows if row.variant.split()[0] == name), key=lambda row: row.median_seconds)
