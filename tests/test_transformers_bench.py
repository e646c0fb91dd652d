"""``turnout bench transformers`` on two small layers: it checks, measures and records what it says."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="transformers is not installed")
from turnout.bench.profile import count
from turnout.bench.scenarios import Scenario
from turnout.bench.transformers_engine import Variant, twin_of
from turnout.bench.whole_model import GEMMA4_26B, TINY, build_model, check_agreement, decode_step, draw_prompts
from turnout.bench.whole_model_check import check_layers
from turnout.cli import app
from turnout.integrations.transformers import apply

SMALL = ("--device", "cpu", "--tiny", "--prefill", "8", "--decode", "2", "--rounds", "2", "--no-compiled")
CPU = torch.device("cpu")


def test_the_geometry_is_that_of_the_released_model():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.Gemma4ForCausalLM._from_config(
            transformers.Gemma4TextConfig(**GEMMA4_26B), dtype=torch.bfloat16
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_233_141_760
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts == 30 * 128 * 3 * 704 * 2816


def test_it_records_checks_logits_and_rows(tmp_path):
    file = tmp_path / "result.json"
    result = CliRunner().invoke(app, ["bench", "transformers", "--json", str(file), "--requests", "1,3", *SMALL])
    assert result.exit_code == 0, result.output
    record = json.loads(file.read_text())
    assert [(row["requests"], row["variant"]) for row in record["rows"]] == [
        (1, "stock"), (1, "turnout"), (3, "stock"), (3, "turnout")
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["step_ms"] > 0
        assert row["device_ms"] > 0
        assert (row["graphs"], len(row["seconds"])) == (0, 2)
    stock, turnout = record["rows"][:2]
    assert turnout["copies"] < stock["copies"]
    assert turnout["launches"] < stock["launches"]
    assert [(check["requests"], check["layer"]) for check in record["layer_checks"]] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    for check in record["layer_checks"]:
        assert 0 < check["turnout_error"] < 0.01
        assert 8 <= check["distinct_experts"] <= 8 * check["requests"]
    for each in record["logits"]:
        assert 0 < each["relative_to_stock"]["turnout"] <= 2 * each["yardstick"] < 0.2
    for each in record["distinct_experts"]:
        assert all(8 <= count <= 8 * each["requests"] for count in each["by_layer"])
    assert "routers: 2 replaced; experts: 2 replaced" in record["applied"]


@pytest.fixture(scope="module")
def checked():
    stock = build_model(TINY, CPU)
    ours = twin_of(stock)
    apply(ours)
    scenario = Scenario(phase="decode", requests=3, prompt_tokens=8, forwards=2)
    step = decode_step(Variant(stock), scenario, draw_prompts(scenario, stock.config.vocab_size, CPU))
    with torch.no_grad():
        yield stock, ours, step


def test_layers_that_agree_pass(checked):
    checks = check_layers(*checked)
    check_agreement(checks)
    assert [check.layer for check in checks] == [0, 1]


def test_layers_that_compute_something_else_stop_the_benchmark(checked, monkeypatch):
    stock, ours, step = checked
    monkeypatch.setattr(ours.model.layers[1].experts, "forward", lambda *arguments: arguments[0])
    with pytest.raises(RuntimeError, match=r"the error of turnout's experts is more than twice .* LayerCheck\(layer=1"):
        check_agreement(check_layers(stock, ours, step))


def test_logits_far_from_stock_stop_it(checked, monkeypatch, tmp_path):
    monkeypatch.setattr("turnout.bench.whole_model.LOGITS_TOLERANCE", 0.01)
    with pytest.raises(RuntimeError, match="turnout's logits lie further from stock's than rounding explains"):
        CliRunner().invoke(
            app,
            ["bench", "transformers", "--json", str(tmp_path / "x"), "--requests", "1", *SMALL],
            catch_exceptions=False,
        )


def test_experts_chosen_otherwise_stop_it_unless_logits_tie(checked):
    checks = check_layers(*checked)
    check_agreement([dataclasses.replace(checks[0], ids_differ=2)])
    with pytest.raises(RuntimeError, match="chose other experts than stock where no logits tie"):
        check_agreement([dataclasses.replace(checks[0], ids_differ=2, ids_differ_without_tie=1)])


def test_a_device_that_is_not_there_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["bench", "transformers", "--json", str(tmp_path / "x"), "--device", "foo"])
    assert result.exit_code == 2
    assert "'foo' is no torch device" in result.stderr


def test_count_gives_the_time_of_all_operators():
    counts = count(lambda: torch.ones(1000).exp(), CPU)
    assert counts.device_ms > 0
    assert counts.graphs == 0
