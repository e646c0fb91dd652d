"""What an audit found, as data: the same object for terminal, JSON and HTML."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from turnout.audit.device_time import DeviceTime
from turnout.audit.picture import Picture
from turnout.audit.rules import REDUNDANT, CopyKind

SCHEMA = "turnout-audit/1"
_MOST_MODULES = 12  # named in a message


@dataclass(frozen=True, slots=True)
class Finding:
    """Copies (or host waits) alike in everything below, counted together.

    Attributes:
        kind: the class, see `CopyKind`.
        op: the operator, for instance ``aten._to_copy.default``.
        module: dotted path of the module that ran it; "" outside any.
        source: ``file:line in function`` of the audited program.
        phase: "prefill", "decode" or whatever the call was named.
        count: how often it ran.
        from_dtype, to_dtype: short names; equal for a copy that keeps the dtype, "" for a wait.
        shape: of the result.
        bytes: read plus written, by all `count` together.
        producer: who made the value that was copied.
        consumers: who reads the result, the first few.
        evidence: what in the recording shows the class.
        remedy: one sentence; "" where nothing is to be done.
        regions: names of the regions that it lies in.
    """

    kind: CopyKind
    op: str
    module: str
    source: str
    phase: str
    count: int
    from_dtype: str
    to_dtype: str
    shape: tuple[int, ...]
    bytes: int
    producer: str
    consumers: tuple[str, ...]
    evidence: str
    remedy: str
    regions: tuple[str, ...] = ()

    @property
    def is_redundant(self) -> bool:
        """Whether a budget counts it."""
        return self.kind in REDUNDANT

    @property
    def is_cast(self) -> bool:
        """Whether it changes the dtype."""
        return self.from_dtype != self.to_dtype


@dataclass(frozen=True, slots=True)
class Phase:
    """Calls of one name: how many, the operators that they ran, and the seconds that recording them took."""

    name: str
    calls: int
    operators: int
    seconds: float


@dataclass(slots=True)
class AuditReport:
    """The findings of one audit.

    Attributes:
        target: what was audited, in words.
        environment: versions and device.
        phases: the calls that were recorded.
        findings: copies and waits in program order, alike ones counted together.
        regions: name and extent of each region.
        region_operators: operators that each region held, by its name.
        module_operators: operators by module, layers folded; "" for those outside any.
        notes: what the audit could not see, one sentence each.
        error: the exception that ended the program early; "" if it ran through. What ran before is reported.
        picture: the dataflow of one layer, for the HTML page; None where there was nothing to draw.
        device_time: what the profiler measured; None if it was not asked.
    """

    target: str
    environment: dict[str, str]
    phases: tuple[Phase, ...]
    findings: tuple[Finding, ...]
    regions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str = ""
    picture: Picture | None = None
    device_time: DeviceTime | None = None
    region_operators: dict[str, int] = field(default_factory=dict)
    module_operators: dict[str, int] = field(default_factory=dict)

    def select(self, *kinds: CopyKind, region: str | None = None, phase: str | None = None) -> tuple[Finding, ...]:
        """Findings of some kinds (all, if none is named), in a region and phase if given.

        Raises:
            KeyError: the report knows no such region.
        """
        if region is not None and region not in self.regions:
            raise KeyError(f"no region {region!r} in this report; it has: {', '.join(self.regions) or 'none'}")
        return tuple(
            f
            for f in self.findings
            if (not kinds or f.kind in kinds)
            and (region is None or region in f.regions)
            and (phase is None or f.phase == phase)
        )

    def redundant(self, region: str | None = None) -> tuple[Finding, ...]:
        """The findings that a budget counts."""
        return self.select(*REDUNDANT, region=region)

    def redundant_count(self, region: str | None = None) -> int:
        """How many redundant copies were made."""
        return sum(f.count for f in self.redundant(region))

    def per_call(self, *kinds: CopyKind, region: str | None = None) -> dict[str, float]:
        """Copies of some kinds in one call, on average, by phase."""
        found = self.select(*kinds, region=region)
        return {p.name: sum(f.count for f in found if f.phase == p.name) / p.calls for p in self.phases}

    def over_budget(self, limit: int, region: str | None = None) -> int:
        """How many redundant copies there are beyond a limit; 0 or less where the budget holds.

        Args:
            limit: how many are allowed.
            region: count only this region's copies.

        Raises:
            ValueError: there is no such region, or no operator ran in it, so that any budget would hold.
        """
        if region is not None and region not in self.regions:
            raise ValueError(f"no region {region!r} to hold a budget; there are: {', '.join(self.regions) or 'none'}")
        if region is not None and not self.region_operators.get(region):
            raise ValueError(f"a budget would hold nothing: {empty_region(self, region)}")
        return self.redundant_count(region) - limit

    def counts(self, region: str | None = None) -> dict[CopyKind, int]:
        """Number of copies of each kind; kinds without any are 0."""
        counts: Counter[CopyKind] = Counter()
        for f in self.select(region=region):
            counts[f.kind] += f.count
        return {kind: counts[kind] for kind in CopyKind}

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text (schema in docs/AUDIT.md), also written to `path` if given."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, text: str) -> AuditReport:
        """A report from the text that `to_json` wrote.

        Raises:
            ValueError: the text is not such a report, or of another schema.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not an audit report: {error}; pass a file that `turnout audit --json` wrote") from None
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise ValueError(f"the report's schema is {found!r}, wanted {SCHEMA!r}; audit again with this version")
        try:
            return cls._from_dict(data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the report is incomplete ({type(error).__name__}: {error}); audit again") from error

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> AuditReport:
        values: dict[str, Any] = {f.name: data[f.name] for f in fields(cls)}
        values["phases"] = tuple(Phase(**phase) for phase in data["phases"])
        values["findings"] = tuple(_finding(finding) for finding in data["findings"])
        values["notes"] = tuple(data["notes"])
        values["picture"] = Picture.from_dict(data["picture"]) if data["picture"] else None
        values["device_time"] = DeviceTime.from_dict(data["device_time"]) if data["device_time"] else None
        return cls(**values)

    def print(self) -> None:
        """Show the report in the terminal."""
        from turnout.audit.terminal import show  # rich is needed only to look

        show(self)

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained page."""
        from turnout.audit.html import page

        Path(path).write_text(page(self), encoding="utf-8")

    def __str__(self) -> str:
        return f"{self.redundant_count()} redundant copies in {self.target}: " + ", ".join(
            f"{n} {kind.value}" for kind, n in self.counts().items() if n
        )


def empty_region(report: AuditReport, region: str) -> str:
    """Says of a region without operators where operators did run."""
    ran = [module or "outside any module" for module in report.module_operators]
    more = f" and {len(ran) - _MOST_MODULES} more" if len(ran) > _MOST_MODULES else ""
    where = ", ".join(ran[:_MOST_MODULES]) or "nowhere"
    return f"no operator ran in region {region!r} ({report.regions[region]}); operators ran in: {where}{more}"


def _finding(data: dict[str, Any]) -> Finding:
    lists = {name: tuple(data[name]) for name in ("shape", "consumers", "regions")}
    return Finding(**{**data, **lists, "kind": CopyKind(data["kind"])})
