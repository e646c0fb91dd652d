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
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {name: value for name, value in data.items() if name in known}
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


def _finding(data: dict[str, Any]) -> Finding:
    lists = {name: tuple(data[name]) for name in ("shape", "consumers", "regions")}
    return Finding(**{**data, **lists, "kind": CopyKind(data["kind"])})
