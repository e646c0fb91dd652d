"""The layer benchmark: what it draws is what it says, and it times nothing that is wrong.

Where it measures it needs CUDA graphs: here the clock and the counters are stand-ins, and the rest is real.
"""

import json

import pytest
import torch
from typer.testing import CliRunner

from turnout.bench import layer
from turnout.bench.ceilings import Ceilings
from turnout.bench.layer_case import ROUTINGS, Geometry, draw_case, draw_layers
from turnout.bench.layer_check import expected_output
from turnout.bench.layer_peers import nearest_tuned_file, transformers_variant, tuned_config
from turnout.bench.profile import Kernel
from turnout.bench.timing import Timing
from turnout.cli import app

SMALL = Geometry(num_experts=32, top_k=4, hidden_size=64, intermediate_size=48)


def drawn(num_tokens, routing="uniform", geometry=SMALL, layers=2):
    generator = torch.Generator().manual_seed(0)
    return draw_case(geometry, num_tokens, routing, draw_layers(geometry, layers, generator), generator)


@pytest.fixture
def machine(monkeypatch):
    """A machine whose clock says 50 us for everything, and which knows no vLLM."""
    monkeypatch.setattr(layer, "find_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(layer, "measure_ceilings", lambda dtype, device: Ceilings(1e6, 1e9))
    monkeypatch.setattr(layer, "launches", lambda call: 3)
    monkeypatch.setattr(layer, "kernels", lambda call, device: [Kernel("gemm", 2.0, 10.0)])
    monkeypatch.setattr(layer, "graph_times", lambda variants, **_: dict.fromkeys(variants, Timing(50.0, 49.0, 51.0)))
    monkeypatch.setattr(layer, "release_memory", lambda: None)


def test_gemma4_takes_the_bytes_and_operations_that_its_sizes_say():
    gemma4 = Geometry()
    assert gemma4.moved(1, 8) == 8 * 3 * 704 * 2816 * 2 + 2 * 2816 * 2
    assert gemma4.moved(1, 128) / 1e9 == pytest.approx(1.52, abs=0.01)  # one layer
    assert gemma4.operations(4096) / 1e9 == pytest.approx(390, abs=1)


@pytest.mark.parametrize(("moved", "operations", "floor"), [(4e6, 1e9, (4.0, "read")), (1e6, 7e9, (7.0, "matmul"))])
def test_the_floor_is_the_larger_of_the_two_times(moved, operations, floor):
    assert Ceilings(1e6, 1e9).floor(moved, operations) == floor


def test_calls_rotate_through_layers_and_batches():
    case = drawn(3)
    pairs = {(case.at(i).hidden_states.data_ptr(), case.at(i).weights.down_proj.data_ptr()) for i in range(64)}
    assert len(pairs) == 32
    for i in (0, 1, 33):
        assert case.at(i).hidden_states.shape == (3, 64)
        assert case.at(i).router_logits.dtype == torch.float32


def test_uniform_routing_takes_as_many_experts_as_chance_gives():
    case = drawn(16, geometry=Geometry(hidden_size=8, intermediate_size=8))
    assert case.distinct_experts() == pytest.approx(128 * (1 - (1 - 8 / 128) ** 16), rel=0.03)  # 82


def test_one_hot_routing_gives_every_token_one_expert_first():
    case = drawn(16, "one_hot")
    hot = [case.routing(i).topk_ids[:, 0].unique() for i in range(32)]
    assert all(len(expert) == 1 for expert in hot)
    assert len(torch.cat(hot).unique()) > 10


def test_skewed_routing_draws_experts_by_popularity():
    case = drawn(512, "skewed", Geometry(hidden_size=8, intermediate_size=8, top_k=1))
    assert case.distinct_experts() < 120
    loads = [case.routing(i).topk_ids.flatten().bincount(minlength=128).sort(descending=True).values for i in range(4)]
    shares = torch.stack(loads).double().mean(0) / 512
    harmonic = sum(1 / rank for rank in range(1, 129))
    assert shares[0] == pytest.approx(1 / harmonic, rel=0.15)
    assert shares[1] == pytest.approx(0.5 / harmonic, rel=0.25)


def test_a_right_output_passes_and_its_error_is_told():
    expected = expected_output(drawn(5), 0)
    assert 0 < expected.plain_error < 0.01
    assert 0 < expected.check("rounded", expected.exact.bfloat16()) < expected.plain_error
    expected.poison_free_memory()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out * 1.05,
        lambda out: out.roll(1, dims=0),
        lambda out: torch.full_like(out, float("nan")),
        lambda out: torch.cat([torch.full_like(out[:1], float("nan")), out[1:]]),
        lambda out: torch.zeros_like(out),
    ],
)
def test_a_wrong_output_is_refused(spoil):
    expected = expected_output(drawn(5), 0)
    with pytest.raises(RuntimeError, match="spoilt is wrong, and not timed: its error is"):
        expected.check("spoilt", spoil(expected.exact).bfloat16())


def test_an_output_of_another_form_is_refused():
    expected = expected_output(drawn(5), 0)
    for out in (expected.exact, expected.exact.bfloat16()[:4]):
        with pytest.raises(RuntimeError, match=r"gives .* not \[5, 64\] of torch.bfloat16"):
            expected.check("other", out)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_variants_that_run_here_are_right_in_every_call(routing, activation):
    geometry = Geometry(num_experts=16, top_k=3, hidden_size=64, intermediate_size=32, activation=activation)
    case = drawn(7, routing, geometry)
    calls = {
        "transformers grouped_mm": transformers_variant(case, "grouped_mm"),
        "transformers batched_mm": transformers_variant(case, "batched_mm"),
        "turnout auto": layer.turnout_variant(case, "auto"),
    }
    for i in (0, 1, 37):
        expected = expected_output(case, i)
        for name, call in calls.items():
            expected.check(name, call(i))


def test_an_implementation_that_transformers_lacks_is_named():
    with pytest.raises(ImportError, match="no experts implementation sorted_mm"):
        transformers_variant(drawn(1), "sorted_mm")


def test_the_tuned_file_of_the_nearest_size_is_taken(tmp_path):
    configs = tmp_path / "model_executor/layers/fused_moe/configs"
    configs.mkdir(parents=True)
    for name in ("E=128,N=512,device_name=NVIDIA_H200.json", "E=128,N=768,device_name=NVIDIA_H200.json",
                 "E=128,N=704,device_name=NVIDIA_B200.json", "E=128,N=704,device_name=NVIDIA_H200,dtype=fp8_w8a8.json",
                 "E=64,N=704,device_name=NVIDIA_H200.json"):  # fmt: skip
        (configs / name).write_text(json.dumps({"triton_version": "3.6.0", "1": {"a": 1}, "16": {"a": 2}}))
    file = nearest_tuned_file(tmp_path, Geometry())
    assert file.name == "E=128,N=768,device_name=NVIDIA_H200.json"
    assert [tuned_config(file, tokens)["a"] for tokens in (1, 8, 9, 4096)] == [1, 1, 2, 2]
    with pytest.raises(FileNotFoundError, match="no file tuned on an H100 or H200 for E=32"):
        nearest_tuned_file(tmp_path, SMALL)


def test_a_run_records_each_row_as_it_comes(machine):
    settings = layer.Settings(geometry=SMALL, num_tokens=(1, 40), layers=2)
    reported = []
    result = layer.run(settings, lambda so_far: reported.append(len(so_far["rows"])), lambda step: None)
    assert reported == [1, 2]
    json.dumps(result)
    first, second = result["rows"]
    assert {"turnout auto", "transformers grouped_mm", "transformers batched_mm"} <= set(first["variants"])
    assert "transformers batched_mm" not in second["variants"]
    assert "not run beyond 32 tokens" in second["absent"]["transformers batched_mm"]
    assert "vLLM cannot be imported" in first["absent"]["vLLM"]
    assert first["distinct_experts"] == 4
    assert first["floor_us"] == pytest.approx(SMALL.moved(1, 4) / 1e6, abs=1e-3)
    assert first["variants"]["turnout auto"] | {"error": 0} == {
        "error": 0,
        "launches": 3,
        "kernels": [{"name": "gemm", "times": 2.0, "us": 10.0}],
        "us": [50.0, 49.0, 51.0],
    }


def test_a_wrong_variant_is_not_timed(machine, monkeypatch):
    def wrong(case, impl):
        return lambda i: torch.zeros_like(case.hidden_states[0])

    monkeypatch.setattr(layer, "turnout_variant", wrong)
    result = layer.run(layer.Settings(geometry=SMALL, num_tokens=(2,), layers=1), lambda so_far: None, print)
    (row,) = result["rows"]
    assert not [name for name in row["variants"] if name.startswith("turnout")]
    assert "turnout auto is wrong, and not timed" in row["absent"]["turnout auto"]


def test_the_table_shows_every_row_and_variant():
    variants = {"turnout auto": {"us": [30.0, 29, 31], "launches": 3}, "vLLM": {"us": [46.0, 45, 47], "launches": 7}}
    row = {"num_tokens": 1, "distinct_experts": 8.0, "megabytes": 95.2, "floor_us": 22.1, "floor_by": "read",
           "variants": variants, "absent": {"turnout grouped_mm": "ImportError: none"}}  # fmt: skip
    other = row | {"num_tokens": 64, "variants": {"vLLM": variants["vLLM"]}}
    printed = layer.table({"rows": [row, other]})
    assert "| 1 | 8.0 | 95 | 22.1 (read) | 30.0 | 46.0 | 0.652 |" in printed
    assert "| 64 | 8.0 | 95 | 22.1 (read) |  | 46.0 |  |" in printed
    assert "| 1 | 3 | 7 |" in printed
    assert "Absent: turnout grouped_mm: ImportError: none" in printed


def test_the_command_writes_the_record_and_prints_the_table(machine, tmp_path):
    file = tmp_path / "layer.json"
    sizes = ["--num-experts", "16", "--top-k", "2", "--hidden-size", "32", "--intermediate-size", "32", "--layers", "1"]
    run = CliRunner().invoke(app, ["bench", "layer", "--json", str(file), "--tokens", "1,3", *sizes])
    assert run.exit_code == 0, run.output
    assert [row["num_tokens"] for row in json.loads(file.read_text())["rows"]] == [1, 3]
    assert "| 3 |" in run.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--routing", "even"], "routing must be one of uniform, skewed, one_hot; got 'even'"),
        (["--dtype", "float8"], "dtype must be one of bfloat16, float16; got 'float8'"),
        (["--activation", "relu"], "activation must be one of"),
        (["--tokens", "1,two"], "--tokens must be numbers with commas between; got 1,two"),
        (["--tokens", "0"], "--tokens must be"),
    ],
)
def test_bad_options_are_refused(option, message, tmp_path):
    run = CliRunner().invoke(app, ["bench", "layer", "--json", str(tmp_path / "out"), *option])
    assert run.exit_code == 2
    assert message in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path):
    run = CliRunner().invoke(app, ["bench", "layer", "--json", str(tmp_path / "out")])
    assert run.exit_code == 2
    assert "there is no CUDA device here" in run.stderr
