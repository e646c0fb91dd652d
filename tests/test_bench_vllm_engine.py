"""The engine of `turnout bench scenarios` around vLLM, without one: options, the emulated consumer, sets of graphs."""

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from turnout.bench.profile import ids_casts
from turnout.bench.scenario_models import Checkpoint
from turnout.bench.scenarios import Scenario
from turnout.bench.vllm_consumer import CONSUMER, declare, emulate_int64_consumer
from turnout.bench.vllm_engine import (
    ENVIRONMENT,
    SLACK,
    Load,
    VllmEngine,
    engine_options,
    modes_of,
    prepare_environment,
)
from turnout.bench.vllm_graphs import capture_graphs, replay_graphs
from turnout.contracts import contracts
from turnout.integrations import _vllm_modes as vllm_modes

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
LOAD = Load(requests=(1, 16), prompt_tokens=128)


def test_options_of_vllm_follow_device_and_weights(tmp_path):
    drawn, bare = (Checkpoint(tmp_path, has_weights=has) for has in (True, False))
    eager = engine_options(drawn, CPU, LOAD, is_eager=True)
    assert (eager["load_format"], eager["enforce_eager"], eager["max_num_seqs"]) == ("auto", True, 16)
    assert eager["max_num_batched_tokens"] >= 16 * 128
    assert not {"attention_backend", "compilation_config"} & set(eager)
    graphs = engine_options(bare, CUDA, LOAD, is_eager=False)
    assert (graphs["load_format"], graphs["attention_backend"]) == ("dummy", "TRITON_ATTN")
    assert graphs["compilation_config"] == {"cudagraph_capture_sizes": [1, 16]}


def test_the_environment_keeps_what_is_set(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    prepare_environment()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_modes_follow_the_consumer():
    assert list(modes_of("own", layer=False)) == ["stock", "turnout"]
    assert list(modes_of("own", layer=True)) == ["stock", "turnout", "turnout layer"]
    modes = modes_of("int64", layer=False)
    assert [(name, mode.plugin, mode.is_declared) for name, mode in modes.items()] == [
        ("stock", "off", False), ("turnout int32", "routing", False), ("turnout", "routing", True)
    ]  # fmt: skip


@pytest.mark.parametrize(("device", "handed_on"), [(CPU, torch.int32), (CUDA, torch.int64)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_emulated_consumer_casts_what_is_not_int64_once(dtype, device, handed_on):
    def experts(*, topk_ids, x):
        assert topk_ids.dtype == handed_on
        assert topk_ids.is_contiguous()
        return topk_ids.tolist(), x

    layer = SimpleNamespace(routed_experts=SimpleNamespace(forward_modular=experts))
    emulate_int64_consumer([layer], device)
    ids = torch.tensor([[5, 0, 2], [1, 7, 3]], dtype=dtype)
    assert layer.routed_experts.forward_modular(topk_ids=ids, x=1) == (ids.tolist(), 1)
    casts = ids_casts(lambda: layer.routed_experts.forward_modular(topk_ids=ids, x=1), CPU, (2, 3))
    assert casts == (dtype == torch.int32)


def test_dispatchers_declare_what_the_catalogue_says_of_the_consumer():
    assert contracts[CONSUMER].ids_dtype == torch.int64
    dispatcher = SimpleNamespace(topk_indices_dtype=lambda: None)
    kernel = SimpleNamespace(prepare_finalize=dispatcher)
    layer = SimpleNamespace(routed_experts=SimpleNamespace(quant_method=SimpleNamespace(moe_kernel=kernel)))
    for is_declared, dtype in ((True, torch.int64), (False, None)):
        declare([layer], is_declared)
        assert dispatcher.topk_indices_dtype() == dtype


class FakeRunner:
    """Captures as vLLM's model runner does: each wrapper and the manager take an entry for each size."""

    def __init__(self, monkeypatch):
        self.wrappers = [SimpleNamespace(concrete_cudagraph_entries={"first": 0}) for _ in range(2)]
        self.cudagraph_manager = SimpleNamespace(graphs={})
        self.captures, self.sizes = 0, (1, 16)
        module = ModuleType("vllm.compilation.cuda_graph")
        module.CUDAGraphWrapper = SimpleNamespace(_all_instances=self.wrappers)
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.compilation", ModuleType("vllm.compilation"))
        monkeypatch.setitem(sys.modules, "vllm.compilation.cuda_graph", module)

    @property
    def stores(self):
        return [*(wrapper.concrete_cudagraph_entries for wrapper in self.wrappers), self.cudagraph_manager.graphs]

    def capture_model(self):
        self.captures += 1
        for store in self.stores:
            assert not store
            store.update({size: f"graph {self.captures} of {size}" for size in self.sizes})


def test_sets_of_graphs_change_places(monkeypatch):
    runner = FakeRunner(monkeypatch)
    first, second = capture_graphs(runner), capture_graphs(runner)
    assert first.number == second.number == 6
    replay_graphs(first)
    assert all(store == {1: "graph 1 of 1", 16: "graph 1 of 16"} for store in runner.stores)
    replay_graphs(second)
    assert all(store == {1: "graph 2 of 1", 16: "graph 2 of 16"} for store in runner.stores)


def test_no_graphs_are_refused(monkeypatch):
    runner = FakeRunner(monkeypatch)
    runner.sizes = ()
    with pytest.raises(RuntimeError, match="vLLM captured no CUDA graph"):
        capture_graphs(runner)


class FakeLLM:
    """As much of vLLM as `VllmEngine` calls: a step gives every request a token, and notes whose graphs are there."""

    def __init__(self, model_runner):
        self.llm_engine, self.runner, self.requests = self, model_runner, {}
        self.seen = []

    def collective_rpc(self, call):
        return [call(SimpleNamespace(model_runner=self.runner))]

    def add_request(self, request_id, prompt, sampling):
        self.requests[request_id] = sampling.max_tokens

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        self.seen.append((vllm_modes.forced, self.runner.cudagraph_manager.graphs.get(1)))
        left = {request: tokens - 1 for request, tokens in self.requests.items()}
        self.requests = {request: tokens for request, tokens in left.items() if tokens}
        return [SimpleNamespace(request_id=request, finished=not tokens) for request, tokens in left.items()]


@pytest.fixture
def fake_llm(monkeypatch):
    runner = FakeRunner(monkeypatch)
    runner.device, runner.get_model = CPU, lambda: nn.ModuleList()
    sys.modules["vllm"].SamplingParams = lambda **fields: SimpleNamespace(**fields)
    inputs = ModuleType("vllm.inputs")
    inputs.TokensPrompt = dict
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    yield FakeLLM(runner)
    vllm_modes.force(None)


def test_each_variant_replays_graphs_that_were_captured_in_its_mode(fake_llm):
    engine = VllmEngine(fake_llm, modes_of("own", layer=True), torch.ones(2, 8, dtype=torch.int64))
    steps = []
    engine.capture(steps.append)
    assert steps == [f"capturing CUDA graphs of {variant}" for variant in ("stock", "turnout", "turnout layer")]
    assert engine.graph_counts == {"stock": 6, "turnout": 6, "turnout layer": 6}
    assert engine.model("stock") is None
    fake_llm.seen.clear()
    for variant in ("turnout", "stock", "turnout layer", "turnout"):
        engine.use(variant)
        engine.generate(engine.prompts[:1], new_tokens=1)
    assert fake_llm.seen == [
        ("routing", "graph 2 of 1"), ("off", "graph 1 of 1"), ("layer", "graph 3 of 1"), ("routing", "graph 2 of 1")
    ]  # fmt: skip


def test_a_decode_goes_on_from_variant_to_variant_and_no_request_ends_while_it_is_timed(fake_llm):
    engine = VllmEngine(fake_llm, modes_of("own", layer=False), torch.ones(2, 8, dtype=torch.int64))
    scenario = Scenario(phase="decode", requests=2, prompt_tokens=8, forwards=4)
    runners = {variant: engine.runner(variant, scenario) for variant in engine.variants}
    timed = []
    for variant in ["stock", "turnout"] * 20:
        runners[variant].prepare()
        before = len(fake_llm.seen)
        for _ in range(4):
            runners[variant].forward()
            assert len(fake_llm.requests) == 2
        assert len(fake_llm.seen) == before + 4
        timed += [mode for mode, _ in fake_llm.seen[before:]]
    assert timed == (["off"] * 4 + ["routing"] * 4) * 20
    assert len(fake_llm.seen) <= 40 * 5 + 3 * SLACK


def test_a_prefill_is_timed_up_to_the_token_of_each_request(fake_llm):
    engine = VllmEngine(fake_llm, modes_of("own", layer=False), torch.ones(2, 8, dtype=torch.int64))
    runner = engine.runner("stock", Scenario(phase="prefill", requests=2, prompt_tokens=8, forwards=1))
    runner.prepare()
    assert (len(fake_llm.requests), fake_llm.seen) == (2, [])
    runner.forward()
    assert (len(fake_llm.requests), len(fake_llm.seen)) == (0, 1)
