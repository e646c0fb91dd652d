"""Programs with known answers: the auditor must give exactly these, in order."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from gallery import IDS, PROGRAMS, REPEATED, UNDECIDED, Program, captured_table

from turnout.audit.build import build_report
from turnout.audit.recorder import Recorder
from turnout.audit.rules import Classifier


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.id)
def test_every_copy_gets_the_class_that_is_known(program: Program, mode) -> None:
    fn = copy.deepcopy(program.fn)  # a module that caches starts afresh
    recorder = Recorder(fn if isinstance(fn, torch.nn.Module) else None)
    with mode():
        recorder.run("call", fn, *program.args)

    classifier = Classifier(recorder.graph)
    verdicts = [verdict for op in recorder.graph if (verdict := classifier.verdict(op)) is not None]
    assert tuple(verdict.kind.value for verdict in verdicts) == program.expected, [v.evidence for v in verdicts]
    assert all(verdict.evidence for verdict in verdicts)


def test_a_captured_tensor_is_cast_again_once_an_earlier_call_has_cast_it() -> None:
    recorder = Recorder()
    for _ in range(3):
        recorder.run("call", captured_table, IDS)
    report = build_report(recorder, "captured_table")
    assert [(f.kind.value, f.count) for f in report.findings] == [(UNDECIDED, 1), (REPEATED, 2)]
