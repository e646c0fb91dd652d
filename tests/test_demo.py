"""`turnout demo`: its measures, its table and its words."""

import dataclasses
import itertools
import json
import statistics
from types import SimpleNamespace

import gemma4_models
import pytest
import torch
from typer.testing import CliRunner

import turnout
from turnout.bench import scenarios, transformers_engine
from turnout.bench.profile import Counts, count
from turnout.bench.scenarios import Row, Scenario, measure
from turnout.bench.transformers_engine import Decode, Variant, decoded_tokens, load_tokenizer, make_prompts, twin_of
from turnout.bench.verdict import change_of, compare, verdict
from turnout.cli import app
from turnout.testing.tiny import TINY_GEMMA4, held_out_text

CPU = torch.device("cpu")
DECODE = Scenario(phase="decode", requests=2, prompt_tokens=8, forwards=3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_demo(monkeypatch, *arguments):
    """The command with small settings: its JSON, and what it prints to stderr."""
    monkeypatch.setattr(transformers_engine, "BITS_PER_BYTE_CHARACTERS", 1024)
    small = ("--prefill", "16", "--decode", "4", "--repeat", "3", "--device", "cpu", "--threads", "1")
    result = CliRunner().invoke(app, ["demo", *small, *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.fixture(scope="module")
def demo():
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_demo(monkeypatch)


# The whole command, on the tiny Gemma 4


def test_rows_are_every_scenario_with_every_variant(demo):
    rows = [(row["phase"], row["requests"], row["variant"]) for row in demo[0]["rows"]]
    assert rows == list(itertools.product(["prefill", "decode"], [1, 16], ["stock", "turnout"]))


def test_a_row_is_consistent(demo):
    for row in demo[0]["rows"]:
        tokens = row["requests"] * (16 if row["phase"] == "prefill" else 1)
        median = statistics.median(row["seconds"])
        assert len(row["seconds"]) == 3
        assert row["tokens_per_second"] == pytest.approx(tokens / median)
        assert row["tpot_ms"] == (None if row["phase"] == "prefill" else pytest.approx(median * 1e3))
        assert row["quartiles_ms"][0] <= median * 1e3 <= row["quartiles_ms"][1]
        assert 0 < row["copy_share"] < 1


def test_turnout_makes_fewer_copies_and_operators_in_every_scenario(demo):
    rows = demo[0]["rows"]
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        assert ours["copies"] < stock["copies"]
        assert ours["launches"] < stock["launches"]


def test_answers_do_not_move_in_float32(demo):
    float32 = demo[0]["float32"]
    assert float32["tokens_identical"] is True
    assert float32["tokens_compared"] == 16 * (1 + 4)
    stock, ours = float32["bits_per_byte"]
    assert round(stock, 4) == round(ours, 4)


def test_json_says_where_it_was_measured_and_for_whom_ids_were_written(demo):
    result = demo[0]
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"]["turnout"] == turnout.__version__
    assert (result["model"]["num_experts"], result["model"]["top_k"], result["model"]["layers"]) == (32, 4, 6)
    decode = result["consumers"]["decode"]
    assert (decode["experts_implementation"], decode["contract_name"]) == ("turnout", "turnout.transformers")
    assert (decode["impl"], decode["experts_impl"], decode["layers"]) == ("cpu", "cpu", 6)


def test_report_has_table_identity_and_verdict(demo):
    result, report = demo
    words = " ".join(report.split())
    for label in ("prefill x 1", "prefill x 16", "decode x 1", "decode x 16"):
        assert label in words
    for row in result["rows"]:
        assert f"{row['copies']} {row['copy_share']:.1%} {row['launches']} " in words
    assert "float32: 80 greedy tokens are identical" in words
    assert words.endswith(result["verdict"])


# Other checkpoints


def test_a_multimodal_checkpoint_without_tokenizer_runs_on_random_ids(monkeypatch, tmp_path):
    gemma4_models.drawn_conditional_generation().save_pretrained(tmp_path)
    result, report = run_demo(monkeypatch, "--model", str(tmp_path), "--dtype", "float32")
    assert result["prompts"] == "random ids (no tokenizer)"
    assert {row["bits_per_byte"] for row in result["rows"]} == {None}
    assert result["float32"]["tokens_identical"] is True
    assert result["consumers"]["prefill"]["layers"] == 2
    assert str(tmp_path) in report.replace("\n", "")


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (gemma4_models.drawn_dense_gemma4, "without Mixture-of-Experts layers"),
        (gemma4_models.drawn_mixtral, "is a mixtral model; pass a Gemma 4"),
    ],
)
def test_other_models_are_refused(tmp_path, draw, says):
    draw().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["demo", "--model", str(tmp_path)])
    assert result.exit_code == 2
    assert says in result.stderr.splitlines()[-1]


# The engine


def test_twin_shares_every_parameter_and_leaves_the_model_stock():
    model = gemma4_models.drawn_gemma4()
    twin = twin_of(model)
    turnout.apply(twin)
    ours, theirs = dict(twin.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert {(row.router.state, row.experts.state) for row in turnout.explain(model)} == {("stock", "stock")}


def test_prompts_are_cut_from_the_text_each_from_its_own_place():
    tokenizer = load_tokenizer(str(TINY_GEMMA4))
    prompts = make_prompts(tokenizer, held_out_text(), requests=16, tokens=4000, vocab_size=288)
    assert prompts.shape == (16, 4000)
    assert (prompts[:, 0] == tokenizer.bos_token_id).all()
    assert len({tuple(prompt.tolist()) for prompt in prompts}) == 16
    assert tokenizer.decode(prompts[0, 1:]) == held_out_text()[:3999]


def test_prompts_longer_than_the_text_are_refused():
    tokenizer = load_tokenizer(str(TINY_GEMMA4))
    with pytest.raises(ValueError, match="has 5 tokens, and each prompt wants 6; lower --prefill"):
        make_prompts(tokenizer, "abcd", requests=2, tokens=6, vocab_size=288)


@pytest.mark.parametrize(
    ("device", "implementation", "in_decode"),
    [("cuda", "grouped_mm", "batched_mm"), ("cuda", "eager", "eager"), ("cpu", "grouped_mm", "grouped_mm")],
)
def test_experts_implementation_is_that_of_generate(device, implementation, in_decode):
    config = SimpleNamespace(_experts_implementation=implementation)
    config.get_text_config = lambda: config
    model = SimpleNamespace(
        config=config,
        device=torch.device(device),
        set_experts_implementation=lambda name: setattr(config, "_experts_implementation", name),
    )
    variant = Variant(model)
    for phase, expected in (("decode", in_decode), ("prefill", implementation), ("decode", in_decode)):
        variant.use_experts(phase)
        assert config._experts_implementation == expected


@torch.no_grad()
def test_each_round_of_decode_starts_after_the_prompts():
    model = gemma4_models.drawn_gemma4()
    prompts = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    decode = Decode(Variant(model), prompts, 3)
    rounds = []
    for _ in range(3):
        decode.prepare()
        rounds.append([decode.logits().clone() for _ in range(2)] + [decode.forward() or decode.tokens[-1]])
    for each in rounds[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rounds[0], each, strict=True))
    ids = torch.cat([prompts, decode.tokens[0]], dim=1)
    torch.testing.assert_close(rounds[2][0], model(input_ids=ids, use_cache=False).logits[:, -1])


def test_compiled_turnout_runs_turnout_and_decodes_as_stock(monkeypatch):
    compile_model = torch.compile  # test_transformers.py runs inductor; here it would only take long
    monkeypatch.setattr(
        torch, "compile", lambda model, mode, **options: compile_model(model, backend="eager", **options)
    )
    stock = gemma4_models.drawn_gemma4()
    ours = twin_of(stock)
    turnout.apply(ours)
    prompts = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    compiled = Variant(ours, is_compiled=True)
    expected = decoded_tokens(Variant(stock), prompts, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tokens = decoded_tokens(compiled, prompts, 3)
    assert torch.equal(tokens, expected)
    for operator in ("turnout::route", "turnout::experts"):
        inside = [e for e in profile.events() if e.name == operator and is_in_compiled_region(e)]
        assert len(inside) == 3 * 2  # steps, layers


def is_in_compiled_region(event):
    while event is not None and not event.name.startswith("Torch-Compiled Region"):
        event = event.cpu_parent
    return event is not None


# Measuring


class Clockwork:
    """A runner that notes its calls."""

    warm_up_forwards = 3

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def prepare(self):
        self.calls.append((self.name, "prepare"))

    def forward(self):
        self.calls.append((self.name, "forward"))
        torch.ones(2).to(torch.bfloat16)


def test_variants_take_turns_and_swap_who_begins():
    calls = []
    rows = measure(DECODE, {"stock": Clockwork("stock", calls), "turnout": Clockwork("turnout", calls)}, CPU, rounds=2)
    once = {name: [(name, "prepare")] + 3 * [(name, "forward")] for name in ("stock", "turnout")}
    assert calls[-16:] == once["stock"] + once["turnout"] + once["turnout"] + once["stock"]
    assert [(row.variant, len(row.seconds), row.counts.copies) for row in rows] == [("stock", 2, 1), ("turnout", 2, 1)]


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, scenarios.FEWEST_ROUNDS), (60.0, scenarios.MOST_ROUNDS)])
def test_rounds_follow_the_time_there_is(monkeypatch, budget, rounds):
    monkeypatch.setattr(scenarios, "SECONDS_PER_SCENARIO", budget)
    (row,) = measure(DECODE, {"stock": Clockwork("stock", [])}, CPU)
    assert len(row.seconds) == rounds


@pytest.mark.parametrize(("budget", "profiles"), [(0.0, 1), (60.0, scenarios.PROFILED_FORWARDS)])
def test_long_forwards_are_profiled_once(monkeypatch, budget, profiles):
    monkeypatch.setattr(scenarios, "SECONDS_PER_PROFILE", budget)
    counted = []
    monkeypatch.setattr(scenarios, "count", lambda call, device: counted.append(call) or Counts(len(counted), 0.1, 1))
    (row,) = measure(DECODE, {"stock": Clockwork("stock", [])}, CPU, rounds=2)
    assert len(counted) == profiles
    assert row.counts.copies == profiles // 2 + 1


def test_count_sees_copies_inside_a_custom_operator_and_counts_it_as_one_launch():
    @torch.library.custom_op("turnout_tests::hides_a_copy", mutates_args=())
    def hides_a_copy(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16).to(torch.float32)

    x = torch.ones(1000)
    hides_a_copy(x)
    counts = count(lambda: hides_a_copy(-x), CPU)
    assert counts.copies == 2
    assert counts.launches == 2
    assert 0 < counts.copy_share < 1
    assert count(lambda: None, CPU) == Counts(0, 0.0, 0)


# The words


def row(variant, seconds, copies=10, launches=100, scenario=DECODE):
    return Row(scenario, variant, Counts(copies, 0.02, launches), tuple(seconds))


def words(stock, ours):
    return verdict([stock, ours], "operators", "CPU time", "it does")


def test_interval_of_the_median_is_that_of_the_sign_test():
    assert change_of([1, 2, 3, 4, 5]).interval is None
    assert change_of([3, 1, 2, 6, 5, 4]) == (3.5, (1, 6))
    assert change_of(range(1, 10)).interval == (2, 8)
    assert change_of(range(1, 26)).interval == (8, 18)  # ranks of the tables of the sign test
    assert change_of([4]) == (4, None)


def test_faster_is_said_only_where_the_interval_leaves_zero_out():
    stock = row("stock", [1.0] * 6)
    assert "shorter in decode x 2 -10.0% (-20.0% to -5.0%)" in words(
        stock, row("turnout", [0.8, 0.9, 0.9, 0.9, 0.9, 0.95])
    )
    level = words(stock, row("turnout", [0.8, 0.9, 0.9, 0.9, 0.9, 1.0]))
    assert "the same within the spread in decode x 2" in level
    assert "no gain in speed here" in level


def test_slower_is_said_plainly():
    text = words(row("stock", [1.0] * 6), row("turnout", [1.1] * 6))
    assert "longer in decode x 2 +10.0%" in text
    assert "no gain in speed here" in text


def test_few_rounds_leave_the_time_open():
    text = words(row("stock", [1.0] * 3), row("turnout", [0.5] * 3))
    assert "open, as 6 rounds are the fewest that can tell, in decode x 2 -50.0%" in text
    assert "no gain" not in text


@pytest.mark.parametrize(
    ("copies", "says"),
    [
        ([7], "3 fewer aten::copy_ calls (10 became 7)"),
        ([12], "2 more aten::copy_ calls (10 became 12)"),
        ([10], "as many aten::copy_ calls as before"),
        ([7, 4], "3 to 6 fewer aten::copy_ calls (10 became 4)"),
        ([10, 4], "0 to 6 fewer aten::copy_ calls (10 became 4)"),
        ([11, 8], "from 2 fewer to 1 more aten::copy_ calls"),
    ],
)
def test_change_of_copies_is_put_by_its_sign(copies, says):
    rows = []
    for requests, number in enumerate(copies, 1):
        scenario = dataclasses.replace(DECODE, requests=requests)
        rows += [row("stock", [1.0] * 6, scenario=scenario), row("turnout", [1.0] * 6, number, scenario=scenario)]
    assert says in verdict(rows, "operators", "CPU time", "it does")


def test_the_fastest_turnout_is_compared_with_the_fastest_stock():
    rows = [
        row("stock", [1.0] * 6),
        row("turnout", [0.9] * 6),
        row("stock compiled", [0.5] * 6),
        row("turnout compiled", [0.6] * 6),
    ]
    (comparison,) = compare(rows)
    assert (comparison.stock, comparison.turnout) == ("stock compiled", "turnout compiled")
    assert comparison.time.median == pytest.approx(0.2)
    assert "longer in decode x 2 compiled +20.0%" in verdict(rows, "operators", "CPU time", "it does")
