"""`turnout bench scenarios`: its counts, checks and words, without vLLM; tests/vllm_cpu runs it with one."""

import dataclasses
import importlib.util
import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from turnout.bench.balance import balance_of
from turnout.bench.profile import Counts, Kernel, copies_inside, ids_casts
from turnout.bench.scenario_result import Further, Result, Settings
from turnout.bench.scenarios import Row, Scenario
from turnout.bench.vllm_check import Replay
from turnout.bench.vllm_engine import ENVIRONMENT
from turnout.cli import app

CPU = torch.device("cpu")


# Settings and refusals


def test_scenarios_are_prefill_and_decode_with_each_number_of_requests():
    scenarios = Settings(requests=(1, 3), prefill=32, decode=5).scenarios
    assert [each.label for each in scenarios] == ["prefill x 1", "prefill x 3", "decode x 1", "decode x 3"]
    assert [each.forwards for each in scenarios] == [1, 1, 5, 5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine": "sglang"}, "--engine must be one of vllm, transformers; got 'sglang'"),
        ({"consumer": "int16"}, "--consumer must be one of own, int64; got 'int16'"),
        ({"engine": "transformers", "consumer": "int64"}, "pass --engine vllm"),
        ({"engine": "transformers", "layer": True}, "pass --engine vllm"),
        ({"layer": True, "consumer": "int64"}, "pass one of them"),
    ],
)
def test_settings_that_contradict_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Settings(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "--model must be one of tiny, gemma4-4-layers, gemma4-30-layers, gemma4-26b, or a"),
        (["--requests", "1,x"], "--requests must be numbers with commas between; got 1,x"),
        (["--device", "foo"], "'foo' is no torch device"),
        (["--engine", "transformers", "--model", "gemma4-26b"], "transformers needs weights, and gemma4-26b has none"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, message, tmp_path):
    json_file = str(tmp_path / "x.json")
    result = CliRunner().invoke(app, ["bench", "scenarios", "--json", json_file, "--device", "cpu", *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_an_environment_without_vllm_is_refused(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *package: None if name == "vllm" else find_spec(name))
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(app, ["bench", "scenarios", "--json", str(tmp_path / "x.json"), "--device", "cpu"])
    assert result.exit_code == 2, result.output
    assert "there is no vLLM in this environment" in result.stderr


# The whole command, in transformers


def test_it_compares_measures_and_records_in_transformers(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    file = tmp_path / "result.json"
    small = ("--device", "cpu", "--prefill", "8", "--decode", "2", "--rounds", "2", "--requests", "1,3")
    command = ["bench", "scenarios", "--engine", "transformers", "--model", "gemma4-4-layers", "--json", str(file)]
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, [*command, *small], catch_exceptions=False)
    torch.set_num_threads(threads)
    assert result.exit_code == 0
    record = json.loads(file.read_text())
    assert [(row["phase"], row["requests"], row["variant"]) for row in record["rows"]] == [
        (phase, requests, variant)
        for phase in ("prefill", "decode")
        for requests in (1, 3)
        for variant in ("stock", "turnout")
    ]
    for row in record["rows"]:
        assert (row["ids_casts"], row["kernels"], len(row["seconds"])) == (0, [], 2)
        assert 0 < row["copies_in_model"] <= row["copies"]
    assert len(record["comparisons"]) == 4
    assert 0 < record["findings"]["balance"]["least_entropy"] <= record["findings"]["balance"]["entropy"] <= 1
    assert [check["layer"] for check in record["findings"]["layer_checks"]] == [0, 2, 3]
    assert len(record["findings"]["plan"]) == 4
    assert "decode x 3" in result.stdout
    assert "normalised entropy of tokens_per_expert" in result.stdout


# Counts


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint8])
def test_ids_casts_are_conversions_between_integers_of_that_shape(dtype):
    ids = torch.zeros(3, 4, dtype=dtype)
    to = torch.int32 if dtype == torch.int64 else torch.int64
    assert ids_casts(lambda: ids.to(to), CPU, (3, 4)) == 1
    assert ids_casts(lambda: [ids.to(to), ids.to(to)], CPU, (3, 4)) == 2
    assert ids_casts(lambda: ids.to(to), CPU, (4, 3)) == 0
    assert ids_casts(lambda: ids.to(torch.float32), CPU, (3, 4)) == 0
    assert ids_casts(lambda: ids.clone(), CPU, (3, 4)) == 0


def test_ids_casts_inside_a_custom_operator_are_seen():
    @torch.library.custom_op("turnout_tests::hides_an_ids_cast", mutates_args=())
    def hides_an_ids_cast(ids: torch.Tensor) -> torch.Tensor:
        return ids.to(torch.int64)

    ids = torch.zeros(3, 4, dtype=torch.int32)
    assert ids_casts(lambda: hides_an_ids_cast(ids), CPU, (3, 4)) == 1


def test_a_profile_that_fails_leaves_the_profiler_usable():
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        ids_casts(fail, CPU, (3, 4))
    assert ids_casts(lambda: torch.zeros(3, 4).int().long(), CPU, (3, 4)) == 1


def test_copies_inside_a_module_leave_those_around_it_out():
    class Clones(nn.Module):
        def forward(self, x):
            return x.clone().clone()

    module, x = Clones(), torch.zeros(3)
    assert copies_inside(lambda: module(x.clone()).clone(), CPU, module) == 2
    assert copies_inside(lambda: x.clone(), CPU, module) == 0
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


# Balance, and the replay of recorded logits


def test_balance_is_one_for_even_counts_and_falls_with_the_busiest():
    even = balance_of([torch.full((8,), 5)])
    assert (even.entropy, even.busiest) == (pytest.approx(1), 1)
    two = balance_of([torch.full((8,), 5), torch.tensor([20, 20, 0, 0, 0, 0, 0, 0])])
    assert two.least_entropy == pytest.approx(math.log(2) / math.log(8))
    assert two.entropy == pytest.approx((1 + two.least_entropy) / 2)
    assert two.busiest == 4


LOGITS = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 2.0, 2.0, 1.0]])  # the second ties at the last of two places
STOCK = (torch.tensor([[0.7, 0.3], [0.9, 0.1]]), torch.tensor([[0, 1], [0, 1]], dtype=torch.int32))


def test_the_replay_counts_ties_apart_and_compares_sets():
    replay = Replay()
    ours = (torch.tensor([[0.3, 0.7], [0.9, 0.1]]), torch.tensor([[1, 0], [0, 2]]))
    replay.add(3, LOGITS, STOCK, ours)
    replay.check()
    assert dataclasses.asdict(replay) == {
        "rows": 2, "boundary_ties": 1, "sets_differ": 1, "sets_differ_without_tie": 0,
        "most_weight_difference": 0.0, "first_tie": 3,
    }  # fmt: skip


def test_other_experts_without_a_tie_stop_the_benchmark():
    replay = Replay()
    replay.add(0, LOGITS, STOCK, (STOCK[0], torch.tensor([[0, 3], [0, 1]])))
    with pytest.raises(RuntimeError, match=r"other experts than vLLM where no logits tie.*sets_differ_without_tie=1"):
        replay.check()


def test_other_weights_stop_it():
    replay = Replay()
    replay.add(0, LOGITS, STOCK, (STOCK[0] + 1e-4, STOCK[1]))
    with pytest.raises(RuntimeError, match="turnout's weights are not vLLM's"):
        replay.check()


# What is printed and recorded


def made_result(consumer="own", variants=("stock", "turnout")):
    scenario = Scenario(phase="decode", requests=2, prompt_tokens=8, forwards=3)
    rows, further = [], {}
    for i, variant in enumerate(variants):
        seconds = tuple((10 - i + 0.01 * n) / 1e3 for n in range(8))
        rows.append(Row(scenario, variant, Counts(20 - i, 0.05, 100 - i), seconds))
        further[scenario, variant] = Further(ids_casts=4 - i, copies_in_model=15 - i, kernels=[])
    findings = {
        "balance": {"entropy": 0.99, "least_entropy": 0.9, "busiest": 1.5},
        "replay": {
            "rows": 10, "boundary_ties": 2, "sets_differ": 1, "sets_differ_without_tie": 0,
            "most_weight_difference": 6e-8,
        },
        "tokens": {"turnout": {"requests": 16, "identical": 15, "explained": 4, "alone": 4}},
    }  # fmt: skip
    return Result(
        settings=Settings(consumer=consumer), device=CPU, findings=findings, rows=tuple(rows), further=further
    )


def shown(result):
    console = Console(file=io.StringIO(), width=200)
    result.show(console)
    return console.file.getvalue()


def test_the_table_shows_casts_and_the_paired_change():
    text = shown(made_result())
    (stock,) = [line for line in text.splitlines() if line.startswith("decode x 2")]
    (ours,) = [line for line in text.splitlines() if line.split()[:1] == ["turnout"]]
    assert stock.split()[-2:] == ["4", "15"]
    assert "-10.0% (-10.0% to -9.9%)" in ours
    assert "15 of 16 requests as stock; alone, 4 of 4 are so" in text
    assert "10 rows, 1 with other experts, of them 0 without a tie" in text


def test_variants_that_differ_in_the_dtype_alone_are_compared_with_each_other():
    result = made_result("int64", ("stock", "turnout int32", "turnout"))
    pairs = [(each["before"], each["after"]) for each in result.to_json()["comparisons"]]
    assert pairs == [("stock", "turnout int32"), ("stock", "turnout"), ("turnout int32", "turnout")]
    assert "Copies fewer by that alone, of one forward: decode x 2 1." in shown(result)


def test_kernels_that_copy_are_those_of_torch_and_of_the_driver():
    kernels = [
        Kernel("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>", 3, 6.0),
        Kernel("Memcpy DtoD (Device -> Device)", 1, 2.0),
        Kernel("Memcpy HtoD (Pinned -> Device)", 5, 1.0),
        Kernel("fused_moe_kernel", 2, 11.0),
    ]
    further = Further(ids_casts=0, copies_in_model=None, kernels=kernels)
    assert further.copy_kernels == 4
    assert further.copy_kernel_share == pytest.approx(8 / 20)
