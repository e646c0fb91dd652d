"""Programs with known answers: the auditor must give exactly these, in order."""

from __future__ import annotations

import pytest
import torch
from gallery import PROGRAMS, Program

from turnout.audit.recorder import Recorder
from turnout.audit.rules import Classifier


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.id)
def test_every_copy_gets_the_class_that_is_known(program: Program) -> None:
    recorder = Recorder(program.fn if isinstance(program.fn, torch.nn.Module) else None)
    recorder.run("call", program.fn, *program.args)

    classifier = Classifier(recorder.graph)
    verdicts = [verdict for op in recorder.graph if (verdict := classifier.verdict(op)) is not None]
    assert tuple(verdict.kind.value for verdict in verdicts) == program.expected, [v.evidence for v in verdicts]
    assert all(verdict.evidence for verdict in verdicts)
