"""`turnout bench scenarios` in a real vLLM, in a process of its own: vLLM is switched and profiled inside of one."""

import json
import os
import subprocess
import sys

import pytest

LAYERS = 6  # of the tiny Gemma 4


@pytest.fixture(scope="module")
def record(vllm_ops, tmp_path_factory):
    file = tmp_path_factory.mktemp("scenarios") / "result.json"
    small = ("--requests", "1,2", "--prefill", "16", "--decode", "2", "--rounds", "2", "--device", "cpu")
    command = [
        sys.executable,
        "-m",
        "turnout",
        "bench",
        "scenarios",
        "--consumer",
        "int64",
        "--json",
        str(file),
        *small,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "decode x 2" in run.stdout
    return json.loads(file.read_text())


def test_every_scenario_has_every_variant(record):
    rows = [(row["phase"], row["requests"], row["variant"]) for row in record["rows"]]
    assert rows == [
        (phase, requests, variant)
        for phase in ("prefill", "decode")
        for requests in (1, 2)
        for variant in ("stock", "turnout int32", "turnout")
    ]
    assert all(len(row["seconds"]) == 2 for row in record["rows"])


def test_turnout_casts_no_ids_and_an_int64_consumer_saves_one_copy_for_each_layer(record):
    for start in range(0, len(record["rows"]), 3):
        stock, int32, ours = record["rows"][start : start + 3]
        assert [row["ids_casts"] for row in (stock, int32, ours)] == [2 * LAYERS, LAYERS, 0]
        assert int32["copies_in_model"] - ours["copies_in_model"] == LAYERS
        assert stock["copies_in_model"] - int32["copies_in_model"] == 4 * LAYERS
        assert ours["launches"] < stock["launches"]
        assert 0 < ours["copies_in_model"] < ours["copies"]


def test_answers_were_compared(record):
    findings = record["findings"]
    assert findings["replay"]["rows"] > 0
    assert findings["replay"]["sets_differ_without_tie"] == 0
    assert findings["replay"]["most_weight_difference"] <= 2e-7
    assert findings["declared"]["same_tokens_and_logprob_sums"] is True
    for tokens in findings["tokens"].values():
        assert tokens["explained"] == tokens["alone"] > 0
    assert len(findings["plan"]) == LAYERS
    assert 0.5 < findings["balance"]["entropy"] <= 1
