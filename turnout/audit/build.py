"""From a recording to a report."""

from __future__ import annotations

import os
import platform
import site
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from turnout._version import __version__
from turnout.audit import dtypes
from turnout.audit.aliasing import name_of
from turnout.audit.graph import Op, Source, Storage
from turnout.audit.picture import draw
from turnout.audit.recorder import Recorder
from turnout.audit.regions import Region, fold, members
from turnout.audit.report import AuditReport, Finding, Phase, empty_region
from turnout.audit.rules import Classifier, Verdict
from turnout.machine import accelerator

_MOST_CONSUMERS = 4


def build_report(recorder: Recorder, target: str, regions: Sequence[Region] = ()) -> AuditReport:
    """Classify what was recorded.

    Args:
        recorder: a recorder whose calls have ended.
        target: what was audited, in words.
        regions: named parts of the program.
    """
    graph = recorder.graph
    classifier = Classifier(graph)
    inside = {region.name: members(graph, region) for region in regions}
    folded: dict[Finding, int] = {}
    for op in graph:
        verdict = classifier.verdict(op)
        if verdict is not None:
            names = tuple(name for name, ops in inside.items() if op.index in ops)
            finding = _finding(recorder, classifier, op, verdict, names)
            folded[finding] = folded.get(finding, 0) + 1
    report = AuditReport(
        target=target,
        environment=environment(_device_of(recorder)),
        phases=_phases(recorder),
        findings=tuple(replace(f, count=n, bytes=f.bytes * n) for f, n in folded.items()),
        regions={r.name: r.start if r.stop is None else f"{r.start}..{r.stop}" for r in regions},
        notes=_notes(recorder),
        error=recorder.error,
        picture=draw(graph, classifier),
        region_operators={name: len(ops) for name, ops in inside.items()},
        module_operators=dict(Counter(fold(op.module) for op in graph)),
    )
    if not report.error:  # a program that ended early may not have come to a region
        empty = (name for name, count in report.region_operators.items() if not count)
        report.notes += tuple(f"{empty_region(report, name)}." for name in empty)
    return report


def environment(device: str) -> dict[str, str]:
    """Versions and hardware, as the report states them.

    Args:
        device: device type that the program ran on, such as "cpu" or "cuda".
    """
    here = accelerator()
    is_here = here is not None and here.type == device
    return {
        "turnout": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.get_device_module(device).get_device_name() if is_here else device,
    }


def _device_of(recorder: Recorder) -> str:
    """Where the program computed: its accelerator, if one of its operators wrote there."""
    types = {view.device for op in recorder.graph for view in op.writes} - {"cpu"}
    return min(types, default="cpu")


def _finding(recorder: Recorder, classifier: Classifier, op: Op, verdict: Verdict, regions: tuple[str, ...]) -> Finding:
    copy = classifier.copies.get(op.index)
    common = {
        "kind": verdict.kind,
        "op": op.name,
        "module": op.module,
        "source": _short(op.source),
        "phase": recorder.graph.calls[op.call],
        "count": 1,
        "evidence": verdict.evidence,
        "remedy": verdict.remedy,
        "regions": regions,
    }
    if copy is None:
        shape, read = (op.reads[0].shape, op.reads[0].nbytes) if op.reads else ((), 0)
        return Finding(**common, from_dtype="", to_dtype="", shape=shape, bytes=read, producer="", consumers=())  # type: ignore[arg-type]
    producer = classifier.producer(copy)
    consumers = dict.fromkeys(name_of(reader) for reader in classifier.consumers(copy))
    return Finding(
        **common,  # type: ignore[arg-type]
        from_dtype=dtypes.short_name(copy.source.dtype),
        to_dtype=dtypes.short_name(copy.target.dtype),
        shape=copy.target.shape,
        bytes=copy.source.nbytes + copy.target.nbytes,
        producer=f"{producer.origin} {producer.label}".strip() if isinstance(producer, Storage) else name_of(producer),
        consumers=tuple(consumers)[:_MOST_CONSUMERS],
    )


def _phases(recorder: Recorder) -> tuple[Phase, ...]:
    operators = Counter(op.call for op in recorder.graph)
    phases: dict[str, Phase] = {}
    for index, name in enumerate(recorder.graph.calls):
        known = phases.get(name, Phase(name, 0, 0, 0.0))
        seconds = known.seconds + recorder.seconds[index]
        phases[name] = Phase(name, known.calls + 1, known.operators + operators[index], round(seconds, 3))
    return tuple(phases.values())


def _notes(recorder: Recorder) -> tuple[str, ...]:
    """What the recorder could not see."""
    notes = []
    ops = recorder.graph.ops
    if not ops:
        notes.append("No PyTorch operator ran: a replayed CUDA graph, or code that does not use PyTorch, is not seen.")
    compiled = sum(op.compiled for op in ops)
    if compiled:
        notes.append(
            f"{compiled} operators belong to code under torch.compile, which runs uncompiled while it is recorded: the"
            " compiler may fuse these copies away. Measure the compiled code with device_time."
        )
    opaque = sorted({op.packet.replace(".", "::") for op in ops if op.is_opaque})
    if opaque:
        notes.append(f"Copies inside these operators are not seen here, only by device_time: {', '.join(opaque)}.")
    return tuple(notes)


def _short(source: Source) -> str:
    return f"{_relative(source.file)}:{source.line} in {source.function}" if source.file else ""


@cache
def _relative(file: str) -> str:
    """A file relative to where packages live, or to the working directory, whichever is nearer."""
    path = Path(file)
    roots = [Path(root) for root in (*site.getsitepackages(), os.getcwd(), *sys.path) if root]
    inside = [root for root in roots if path.is_relative_to(root)]
    return str(path.relative_to(max(inside, key=lambda root: len(root.parts)))) if inside else file
