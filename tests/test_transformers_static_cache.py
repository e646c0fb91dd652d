"""generate() with a static cache compiles the decode step of an applied model as one graph."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from gemma4_models import drawn_gemma4, left_padded_prompts, text_ids
from torch._dynamo.utils import counters

from turnout.bench.profile import count
from turnout.bench.transformers_engine import Decode, Variant, decoded_tokens
from turnout.integrations.transformers import apply
from turnout.testing.tiny import load_tiny_gemma4

NEW_TOKENS = 6


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()


def generated(model, inputs, compile_config):
    return model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation="static",
        compile_config=compile_config,
        disable_compile=compile_config is None,
    )


def one_graph_config(**options):
    """A compilation that raises at the first graph break."""
    config = transformers.CompileConfig(fullgraph=True, **options)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize(("requests", "prompt"), [(1, 8), (16, 8), (2, 24)], ids=["one", "many", "window full"])
def test_decode_is_compiled_without_a_break_and_runs_both_stations(requests, prompt):
    model = drawn_gemma4()  # its window holds 16 tokens
    inputs = {"input_ids": torch.randint(8, 56, (requests, prompt))}
    stock = generated(model, inputs, None)
    apply(model)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        compiled = generated(model, inputs, one_graph_config(backend="eager", mode=None))
    assert torch.equal(compiled, stock)
    assert not counters["graph_break"]
    for operator in ("turnout::route", "turnout::experts"):
        inside = [event for event in trace.events() if event.name == operator and is_in_compiled_region(event)]
        assert len(inside) == (NEW_TOKENS - 1) * 2  # the first token is the prefill's; two layers


def is_in_compiled_region(event):
    while event is not None and not event.name.startswith("Torch-Compiled Region"):
        event = event.cpu_parent
    return event is not None


def test_the_implementation_is_the_same_in_prefill_and_decode_on_any_device(monkeypatch):
    """Stock generate() decodes grouped_mm models with batched_mm wherever the device is no CPU."""
    model = drawn_gemma4()
    apply(model)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with model._optimize_model_for_decode():
        assert model.config._experts_implementation == "turnout"
    assert model.config._experts_implementation == "turnout"


@pytest.fixture
def cuda(gpu):
    if gpu.type != "cuda":
        pytest.skip(f"graphs are replayed through torch.cuda; this machine has {gpu.type}")
    return gpu


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("requests", [1, 16])
    def test_generate_skips_no_graph(self, cuda, requests):
        model = load_tiny_gemma4(experts_implementation="grouped_mm").to(cuda)
        apply(model)
        inputs = left_padded_prompts() if requests == 16 else {"input_ids": text_ids(24)}
        inputs = {name: tensor.to(cuda) for name, tensor in inputs.items()}
        eager = generated(model, inputs, None)
        for _ in range(3):
            assert torch.equal(generated(model, inputs, one_graph_config()), eager)
        assert not counters["graph_break"]
        assert counters["inductor"]["cudagraph_skips"] == 0

    @pytest.mark.parametrize("requests", [1, 16])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_a_decode_step_is_one_graph(self, cuda, dtype, requests):
        """Of each step, also of one that comes for the first time: its number is in no kernel. Beside it is argmax."""
        model = load_tiny_gemma4(dtype, experts_implementation="grouped_mm").to(cuda)
        apply(model)
        prompts = left_padded_prompts()["input_ids"][:requests].to(cuda)
        decode = Decode(Variant(model, is_compiled=True), prompts, 8)
        with torch.no_grad():
            decode.prepare()
            for _ in range(7):  # compiles twice, warms up, records
                decode.forward()
            counts = count(decode.forward, cuda)
        print(counts)
        assert counts.graphs == 1
        assert not counters["graph_break"]
        assert counters["inductor"]["cudagraph_skips"] == 0

    def test_compiled_tokens_equal_eager_ones_in_float32(self, cuda):
        model = load_tiny_gemma4(experts_implementation="grouped_mm").to(cuda)
        prompts = left_padded_prompts()["input_ids"].to(cuda)
        stock = decoded_tokens(Variant(model), prompts, 8)
        apply(model)
        assert torch.equal(decoded_tokens(Variant(model), prompts, 8), stock)
        assert torch.equal(decoded_tokens(Variant(model, is_compiled=True), prompts, 8), stock)

    @pytest.mark.parametrize(("tokens", "most"), [(1, 3), (16, 6), (1024, 6)])
    def test_a_layer_is_few_launches_after_its_projection_and_never_waits(self, cuda, tokens, most):
        """Few tokens: routing, gate_up, down. Many: besides these the order of the slots, in two, and the sum."""
        model = load_tiny_gemma4(torch.bfloat16).to(cuda)
        apply(model)
        layer = model.model.layers[0]
        router, hidden_states = layer.router, torch.randn(tokens, 128, dtype=torch.bfloat16, device=cuda)

        def projected():
            router.proj(router.norm(hidden_states) * router.scale * router.scalar_root_size)

        def whole():
            _, topk_weights, topk_ids = router(hidden_states)
            layer.experts(hidden_states, topk_ids, topk_weights)

        with torch.no_grad():
            for call in (projected, whole):
                call()  # compiles
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                whole()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            before, counts = count(projected, cuda), count(whole, cuda)
        assert counts.launches - before.launches <= most
        assert counts.copies == before.copies
