"""``turnout audit`` and ``turnout doctor`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from turnout.audit.cli import audit_command, doctor_command
from turnout.audit.doctor import Effect, examine

pytest.importorskip("transformers")
import gemma4_models

app = typer.Typer()
app.command("audit")(audit_command)
app.command("doctor")(doctor_command)

PROGRAM = """
import torch

def wasteful():
    return (torch.ones(3) * 2).clone() + 1

def raising():
    wasteful()
    raise RuntimeError("half-way")

NUMBER = 3
"""


WASTEFUL = ("--module", "audited_program:wasteful")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "audited_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    return "audited_program"


def run(*args: str) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_callable_is_audited_and_written_as_json_and_html(program, tmp_path) -> None:
    result = run(
        "audit", "--module", f"{program}:wasteful", "--json", tmp_path / "a.json", "--html", tmp_path / "a.html"
    )
    assert result.exit_code == 0, result.output
    assert "1 redundant copy in wasteful" in words(result.output)
    assert json.loads((tmp_path / "a.json").read_text())["findings"][0]["kind"] == "layout"
    assert "<svg" not in (tmp_path / "a.html").read_text()  # no module, no picture


def test_over_budget_exits_with_one_and_says_so(program) -> None:
    result = run("audit", "--module", f"{program}:wasteful", "--fail-over", "0")
    assert result.exit_code == 1
    assert "over budget: 1 redundant copies, allowed 0" in result.output
    assert run("audit", "--module", f"{program}:wasteful", "--fail-over", "1").exit_code == 0


def test_a_program_that_raises_is_reported_and_exits_with_one(program) -> None:
    result = run("audit", "--module", f"{program}:raising")
    assert result.exit_code == 1
    assert "The program raised RuntimeError: half-way" in words(result.output)
    assert "1 redundant copy" in result.output


def test_a_model_before_and_after_apply_compared(tmp_path) -> None:
    before, after, html = tmp_path / "before.json", tmp_path / "after.json", tmp_path / "both.html"
    small = ("audit", "--model", "tiny", "--prefill", "8", "--decode", "1")
    assert run(*small, "--json", before).exit_code == 0
    applied = run(*small, "--apply", "--json", after, "--fail-over", "0", "--budget-region", "routing")
    assert applied.exit_code == 0, applied.output
    result = run("audit", "--compare", before, after, "--html", html)
    assert result.exit_code == 0
    assert "dtype mismatch" in result.output
    assert "<svg" in html.read_text()


def test_a_region_may_be_named(program) -> None:
    small = ("audit", "--model", "tiny-mixtral", "--prefill", "4", "--decode", "0")
    result = run(*small, "--region", "attention=*.self_attn", "--fail-over", "0", "--budget-region", "attention")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give exactly one of --model, --module and --compare"),
        (("--model", "no-such/model"), "could not load the model 'no-such/model'"),
        (("--model", "tiny", "--device", "xpu"), "device 'xpu' was asked for"),
        (("--model", "tiny", "--dtype", "bf17"), "'bf17' is no torch dtype"),
        (("--module", "audited_program"), "must be pkg.mod:callable"),
        (("--module", "audited_program:absent"), "no attribute 'absent'"),
        (("--module", "audited_program:NUMBER"), "is a int, not a callable"),
        (("--module", "no_such_module:x"), "No module named 'no_such_module'"),
        (("--module", "audited_program:wasteful", "--region", "bad"), "must be NAME=START"),
        ((*WASTEFUL, "--fail-over", "0", "--budget-region", "routing"), "no region 'routing' for --budget-region"),
        ((*WASTEFUL, "--budget-region", "routing"), "give --fail-over N too"),
        (
            (*WASTEFUL, "--region", "typo=*.nope", "--fail-over", "0", "--budget-region", "typo"),
            "a budget would hold nothing: no operator ran in region 'typo'",
        ),
        ((*WASTEFUL, "--apply", "--experts", "eager", "--dtype", "float32"), "--module does not read --dtype,"),
        ((*WASTEFUL, "--json", "no/such/folder/a.json"), "no folder 'no/such/folder' to write a.json in"),
        (("--compare", "no.json", "such.json"), "No such file"),
        (("--compare", "no.json", "such.json", "--fail-over", "0"), "--compare does not read --fail-over"),
        (("--model", "tiny", "--device", "foo"), "'foo' is no torch device"),
    ],
)
def test_bad_input_exits_with_two_and_one_sentence(program, args, message) -> None:
    result = run("audit", *args)
    assert result.exit_code == 2
    assert message in words(result.output)
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "bad", [("--region", "bad"), ("--fail-over", "0", "--budget-region", "typo"), ("--json", "no/such/folder/a.json")]
)
def test_bad_input_is_refused_before_the_program_runs(program, bad) -> None:
    """A program that raises ends with 1: with 2 it was never called."""
    result = run("audit", "--module", f"{program}:raising", *bad)
    assert result.exit_code == 2
    assert "half-way" not in result.output


def test_a_model_in_which_nothing_can_be_replaced_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("turnout.audit.models.load", lambda name, **_: gemma4_models.drawn_nemotron_h())
    result = run("audit", "--model", "nemotron", "--apply")
    assert result.exit_code == 2
    assert "--apply: turnout.apply replaces nothing in this NemotronHForCausalLM" in words(result.output)


class TestDoctor:
    def test_without_a_model_it_looks_at_the_machine(self) -> None:
        result = run("doctor")
        assert result.exit_code == 0
        assert "transformers" in result.output
        assert "Pass --model" in result.output

    def test_the_tiny_model_would_lose_its_redundant_copies(self) -> None:
        result = run("doctor", "--model", "tiny")
        assert result.exit_code == 0, result.output
        shown = words(result.output)
        assert "redundant copies, logits to layer output │ 12 │ 0" in shown
        assert "turnout.apply replaces 6 routers and 6 experts of 6 layers" in shown
        assert "grouped_mm" in shown

    def test_experts_count_where_the_router_is_not_replaced(self) -> None:
        result = run("doctor", "--model", "tiny-mixtral")
        assert result.exit_code == 0, result.output
        assert "turnout.apply replaces 0 routers and 4 experts of 4 layers" in words(result.output)

    def test_a_family_that_is_not_replaced_is_told_that_there_is_no_gain(self, monkeypatch) -> None:
        monkeypatch.setattr("turnout.audit.doctor.load", lambda name, **_: gemma4_models.drawn_nemotron_h())
        assert examine("nemotron").verdict == "No gain here: turnout replaces nothing in this model yet."

    @pytest.mark.parametrize(
        ("before", "after", "words"),
        [(8.0, 16.0, "slower here: 8.00 ms -> 16.00 ms"), (8.0, 4.0, "50% of a decode step"),
         (8.0, 8.05, "no gain here that can be told from noise")],
    )  # fmt: skip
    def test_the_gain_in_words(self, before, after, words) -> None:
        effect = Effect(redundant=(6, 0), operators=(1, 1), step_ms=(before, after), spread_ms=0.1)
        assert effect.gain.startswith(words)

    def test_a_model_without_routers_is_told_what_was_looked_for(self, monkeypatch) -> None:
        monkeypatch.setattr("turnout.audit.doctor.load", lambda name, **_: torch.nn.Linear(2, 2))
        assert "no router (or gate) beside a module called experts was found" in examine("dense").verdict

    def test_a_model_that_is_not_there_is_refused(self) -> None:
        assert run("doctor", "--model", "no-such/model").exit_code == 2
