"""The report as data: selection, JSON there and back, comparison, and the documented schema."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from gallery import BF16, F32, Nested, pr_40565

from turnout.audit.api import audit, audit_calls
from turnout.audit.build import build_report
from turnout.audit.compare import compare
from turnout.audit.device_time import DeviceTime, ModuleTime, PhaseTime
from turnout.audit.folding import fold_layers
from turnout.audit.picture import Node, Picture
from turnout.audit.recorder import Recorder
from turnout.audit.regions import Region
from turnout.audit.report import SCHEMA, AuditReport, Finding, Phase
from turnout.audit.rules import CopyKind
from turnout.audit.terminal import summary

DOCS = Path(__file__).parents[2] / "docs" / "AUDIT.md"


@pytest.fixture(scope="module")
def report() -> AuditReport:
    return audit_calls(Nested(), BF16, regions=[Region("second", "inner.1")], device_time="cpu")


def test_json_there_and_back_is_the_same_report(report, tmp_path) -> None:
    path = tmp_path / "report.json"
    text = report.to_json(path)
    assert AuditReport.from_json(text) == report
    assert AuditReport.from_json(path.read_text()) == report
    assert json.loads(text)["schema"] == SCHEMA


def test_the_schema_in_the_docs_names_every_field() -> None:
    documented = set(re.findall(r"^\| `([\w.]+)` \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE))
    parts = {"": AuditReport, "phases.": Phase, "findings.": Finding, "picture.": Picture, "picture.nodes.": Node,
             "device_time.": DeviceTime, "device_time.phases.": PhaseTime,
             "device_time.phases.modules.": ModuleTime}  # fmt: skip
    fields = {prefix + field.name for prefix, cls in parts.items() for field in dataclasses.fields(cls)}
    assert documented >= fields | {"schema"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not an audit report"),
        ("[]", f"schema is None, wanted '{SCHEMA}'"),
        ('{"schema": "turnout-audit/99"}', "audit again with this version"),
        (f'{{"schema": "{SCHEMA}"}}', "the report is incomplete .KeyError: 'target'.; audit again"),
        (f'{{"schema": "{SCHEMA}", "phases": [{{}}]}}', "the report is incomplete"),
    ],
)
def test_text_that_is_no_report_is_refused(text, message) -> None:
    with pytest.raises(ValueError, match=message):
        AuditReport.from_json(text)


def test_a_report_cut_short_is_refused(report) -> None:
    data = json.loads(report.to_json())
    for name in ("findings", "region_operators"):
        with pytest.raises(ValueError, match=f"the report is incomplete .KeyError: '{name}'"):
            AuditReport.from_json(json.dumps({key: value for key, value in data.items() if key != name}))
    del data["findings"][0]["shape"]
    with pytest.raises(ValueError, match=r"the report is incomplete .KeyError: 'shape'"):
        AuditReport.from_json(json.dumps(data))


def test_the_summary_is_per_call_and_split_by_phase_in_every_region() -> None:
    recorder = Recorder()
    for phase in ("prefill", "decode", "decode"):
        recorder.run(phase, lambda x: (x * 2).clone() + 1, F32)
    recorder.run("decode", lambda x: x + 1, F32)
    recorder.run("decode", lambda x: x + 1, F32)
    head, rows = summary(build_report(recorder, "steps", [Region("all", "")]))
    assert head == ["class", "prefill", "decode", "in all", "bytes in all"]
    assert [cells for _, cells in rows] == [
        ["layout", "1", "0.5", "1 / 0.5", "576 B"],
        ["all redundant", "1", "0.5", "1 / 0.5", "576 B"],
    ]


def test_selection_by_kind_and_region(report) -> None:
    assert report.counts()[CopyKind.REPEATED] == 2
    assert report.counts("second")[CopyKind.REPEATED] == 1
    assert {f.module for f in report.select(region="second")} == {"inner.1"}
    with pytest.raises(KeyError, match="no region 'third' in this report; it has: second"):
        report.redundant("third")


def test_bytes_are_read_plus_written(report) -> None:
    weight = report.select(CopyKind.REPEATED)[0]
    assert weight.bytes == 6 * 2 + 6 * 4


def test_equal_layers_are_folded_and_different_ones_are_not(report) -> None:
    labels = [label for label, _ in fold_layers(report.findings)]
    assert labels == ["inner.0", "inner.1"]  # their producers differ: add, and the norm before
    again = [dataclasses.replace(f, module=f"layers.{i}.norm") for i in (0, 1, 2, 5) for f in report.findings]
    ((label, below),) = fold_layers(again)
    assert label == "layers.0-2,5 (x 4)"
    assert sum(f.count for f in below) == sum(f.count for f in report.findings)
    assert {f.module for f in below} == {"norm"}


def test_comparison_is_per_call_and_wants_a_phase_in_common(report) -> None:
    rows = compare(report, audit(lambda x: x + 1, BF16))
    assert {(row.what, row.before, row.after) for row in rows} >= {("repeated", 2.0, 0.0)}
    assert [row.after for row in rows if row.unit == "operators"] == [1.0]
    other = dataclasses.replace(report, phases=(Phase("decode", 1, 1, 0.0),))
    with pytest.raises(ValueError, match="share no phase"):
        compare(report, other)


def test_the_producer_and_consumer_of_the_copy_of_pr_40565_are_named() -> None:
    (finding,) = audit(pr_40565, F32).redundant()
    assert finding.kind is CopyKind.DTYPE_MISMATCH
    assert finding.producer == "turnout_gallery.topk_int32"
    assert finding.consumers == ("scatter",)
    assert (finding.from_dtype, finding.to_dtype, finding.shape) == ("int32", "int64", (4, 2))
    assert finding.remedy == "Let turnout_gallery.topk_int32 store int64, or its reader take int32."


def test_the_remedy_for_floats_keeps_the_rounding() -> None:
    """The reader widens a rounded result: stored wide and unrounded it would be another number."""
    (finding,) = audit(lambda x: (x * 2).float() + 1, BF16).redundant()
    assert finding.remedy == "Let mul round to bfloat16 and store it as float32, or its reader take bfloat16."


def test_the_terminal_shows_counts_remedies_and_what_was_not_seen(capsys) -> None:
    audit(pr_40565, F32).print()
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 redundant copy in pr_40565" in shown
    assert "Let turnout_gallery.topk_int32 store int64" in shown
    assert "Not seen: Copies inside these operators" in shown


def test_a_clean_program_shows_zero(capsys) -> None:
    audit(lambda x: x + 1, torch.ones(3)).print()
    assert "0 redundant copies" in capsys.readouterr().out
