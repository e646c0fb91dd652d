"""The command line: what it lists, and what it says to a user who asks for what cannot be."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import turnout
from turnout.cli import app, entry_json


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def refusal(*arguments):
    """What a refused command says: one line, on stderr alone, with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    return line


def test_python_m_turnout_prints_the_version():
    answer = subprocess.run([sys.executable, "-m", "turnout", "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout == f"turnout {turnout.__version__}\n"


def test_no_command_shows_the_commands():
    result = run()
    assert "demo" in result.output
    assert "contracts" in result.output


def test_contracts_lists_every_consumer():
    result = run("contracts")
    first_words = {line.split()[0] for line in result.stdout.splitlines() if line.strip()}
    assert result.exit_code == 0
    assert set(turnout.contracts) <= first_words


def test_contracts_row_has_form_versions_and_evidence():
    rows = [line.split() for line in run("contracts").stdout.splitlines()]
    (row,) = [row for row in rows if row and row[0] == "transformers.expert_parallel.local"]
    assert row[1:] == ["int64", "float32", "num_experts", "local", "-", ">=5.22,<=5.23", "run"]


def test_contracts_json_is_the_whole_catalogue():
    rows = json.loads(run("contracts", "--json").stdout)
    assert [row["name"] for row in rows] == list(turnout.contracts)
    for row in rows:
        contract = turnout.contracts[row["name"]]
        assert row["ids_dtype"] == str(contract.ids_dtype).removeprefix("torch.")
        assert row["structures"] == list(contract.structures)


def test_contracts_of_a_name_shows_its_entry_whole():
    entry = turnout.contracts.entry("transformers.grouped_mm")
    shown = " ".join(run("contracts", entry.name).stdout.split())
    for value in (entry.reads, entry.repository, entry.path, entry.commit, entry.note):
        assert value in shown
    assert json.loads(run("contracts", entry.name, "--json").stdout) == [json.loads(json.dumps(entry_json(entry)))]


def test_contracts_refuses_an_unknown_name_and_offers_those_near():
    assert "Did you mean transformers.eager" in refusal("contracts", "transformers.eagre")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "abacus"], "'abacus' is no torch device"),
        (["--device", "mps"], "'mps' was asked for"),
        (["--dtype", "int8"], "dtype must be one of bfloat16"),
        (["--model", "./not/there"], "no checkpoint folder './not/there'"),
        (["--model", "turnout-tests/no-such-model"], "cannot load 'turnout-tests/no-such-model'"),
        (["--prefill", "4090", "--decode", "16"], "more than the model's 4096 positions"),
    ],
)
def test_demo_refuses_in_one_sentence(arguments, says):
    assert says in refusal("demo", *arguments, "--threads", "1")


@pytest.mark.parametrize("arguments", [["--repeat", "1"], ["--prefill", "0"], ["--decode", "-1"], ["--nonsense"]])
def test_demo_refuses_bad_options(arguments):
    result = run("demo", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
