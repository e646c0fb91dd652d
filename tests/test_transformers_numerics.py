"""A transformers model computes with turnout what it computes without, in fewer copies."""

import collections
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("transformers", reason="transformers is not installed")
from gemma4_models import (
    drawn_conditional_generation,
    left_padded_prompts,
    logits_of,
    routers_of,
    text_ids,
)  # fmt: skip

from turnout.integrations.transformers import apply, restore
from turnout.testing.bits_per_byte import bits_per_byte
from turnout.testing.tiny import load_tiny_gemma4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return load_tiny_gemma4(experts_implementation="grouped_mm")


# The model computes what it did before


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_greedy_tokens_equal_stock_in_float32(implementation):
    model = load_tiny_gemma4(experts_implementation=implementation)
    prompt = {"input_ids": text_ids(48), "max_new_tokens": 24, "do_sample": False}
    stock = model.generate(**prompt)
    apply(model)
    assert torch.equal(model.generate(**prompt), stock)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_equal_stock_for_16_left_padded_prompts(model, cache):
    arguments = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    if cache == "static":
        arguments["cache_implementation"] = "static"
    batch = left_padded_prompts()
    stock = model.generate(**batch, **arguments)
    apply(model)
    assert torch.equal(model.generate(**batch, **arguments), stock)


@pytest.mark.parametrize("experts", [True, False], ids=["router and experts", "router"])
def test_bits_per_byte_equal_stock_to_four_digits_in_float32(model, experts):
    stock = bits_per_byte(model, text_ids(2049)[0])
    apply(model, experts=experts)
    assert f"{bits_per_byte(model, text_ids(2049)[0]):.4f}" == f"{stock:.4f}"


def test_sampled_tokens_equal_stock_from_the_same_seed(model):
    def sampled():
        torch.manual_seed(7)
        return model.generate(text_ids(32), max_new_tokens=16, do_sample=True, temperature=0.8)

    stock = sampled()
    apply(model)
    assert torch.equal(sampled(), stock)


def test_a_nested_model_computes_what_stock_computes():
    model = drawn_conditional_generation()
    ids = torch.randint(8, 56, (2, 12))
    stock = logits_of(model, ids)
    apply(model)
    torch.testing.assert_close(logits_of(model, ids), stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients_and_refuses_to_run_with_them(model, guard):
    ids = text_ids(16)
    with guard():
        stock = model(ids).logits
        apply(model)
        torch.testing.assert_close(model(ids).logits, stock, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"requires grad, and turnout computes for inference only"):
        model(ids)


def test_bf16_routes_recorded_hidden_states_as_stock_except_for_ties_at_the_boundary():
    model = load_tiny_gemma4(torch.bfloat16, experts_implementation="grouped_mm")
    recorded = record_routers(model, text_ids(1024))
    apply(model)
    tied, different, errors = [], [], []
    for router, (hidden_states, router_logits, stock_weights, stock_ids) in recorded.items():
        with torch.no_grad():
            _, weights, ids = router(hidden_states)
        stock, applied = scattered(stock_weights, stock_ids), scattered(weights, ids)
        ranked = router_logits.sort(dim=-1, descending=True).values
        tied.append(ranked[:, ids.shape[1] - 1] == ranked[:, ids.shape[1]])
        different.append((stock.isnan() != applied.isnan()).any(dim=1))
        errors.append((stock - applied).abs().nan_to_num().amax(dim=1))
    tied, different, errors = map(torch.cat, (tied, different, errors))
    counts = f"{len(tied)} rows, {int(tied.sum())} tied at the boundary, {int(different.sum())} unlike stock"
    print(counts)
    assert len(tied) == 6 * 1024
    assert not (different & ~tied).any(), f"ids differ in rows without a tie at the boundary; {counts}"
    assert errors[~different].max() <= 2e-7, counts


def record_routers(model, ids):
    """By router: hidden states, logits, weights and ids of one stock forward."""
    recorded, logits, handles = {}, {}, []

    def keep_logits(proj, args, output):
        logits[proj] = output

    def keep_routing(router, args, output):
        recorded[router] = (args[0], logits[router.proj], *output[1:])

    for router in routers_of(model):
        handles.append(router.proj.register_forward_hook(keep_logits))
        handles.append(router.register_forward_hook(keep_routing))
    logits_of(model, ids)
    for handle in handles:
        handle.remove()
    return recorded


def scattered(weights, ids):
    """[T, E]: the weight of each chosen expert, NaN elsewhere."""
    return torch.full((len(ids), 32), torch.nan).scatter_(1, ids, weights)


# What lies between router and experts


def test_experts_read_what_a_hook_made_of_the_routing(model):
    """Nothing is handed over beside the ids: whoever changes them is heard."""

    def reversed_experts(router, args, output):
        probabilities, weights, ids = output
        return probabilities, weights, 31 - ids

    ids = text_ids(24)
    handles = [router.register_forward_hook(reversed_experts) for router in routers_of(model)]
    stock = logits_of(model, ids)
    apply(model)
    torch.testing.assert_close(logits_of(model, ids), stock, rtol=0, atol=1e-4)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(logits_of(model, ids), stock, atol=0.1)


def test_accelerate_hooks_around_the_experts_keep_running(model):
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    seen = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    ids = text_ids(20)
    stock = logits_of(model, ids)
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer.experts, Counting())
    apply(model)
    torch.testing.assert_close(logits_of(model, ids), stock, rtol=0, atol=1e-4)
    assert seen == [layer.experts for layer in model.model.layers]


# Output recorders


@pytest.mark.parametrize("first", ["hooks", "apply"])
def test_recorded_router_probabilities_equal_stock_whatever_came_first(model, first):
    ids = text_ids(24)
    with torch.no_grad():
        stock = load_tiny_gemma4(experts_implementation="grouped_mm").model(ids, output_router_logits=True)
        if first == "hooks":
            model.model(ids, output_router_logits=True)
        apply(model)
        applied = model.model(ids, output_router_logits=True)
        restore(model)
        restored = model.model(ids, output_router_logits=True)
    assert len(stock.router_logits) == len(applied.router_logits) == 6
    for wanted, got, after in zip(stock.router_logits, applied.router_logits, restored.router_logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
        assert torch.equal(after, wanted)
    # Nothing routed before the first layer, so what it records is stock's to the bit.
    assert torch.equal(applied.router_logits[0], stock.router_logits[0])


def test_probabilities_are_computed_only_for_a_listener(model):
    apply(model)
    router = routers_of(model)[0]
    hidden_states = torch.randn(3, 128)
    with torch.no_grad():
        assert router(hidden_states)[0] is None
        handle = router.register_forward_hook(lambda module, args, output: None)
        probabilities, _, _ = router(hidden_states)
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(3))
        handle.remove()
        assert router(hidden_states)[0] is None


# Costs


def test_a_router_call_makes_no_copy_after_the_projection():
    model = load_tiny_gemma4(torch.bfloat16, experts_implementation="grouped_mm")
    router = routers_of(model)[0]
    hidden_states = torch.randn(64, 128, dtype=torch.bfloat16)
    stock = copies(router, hidden_states)
    projection = copies(lambda x: router.proj(router.norm(x) * router.scale * router.scalar_root_size), hidden_states)
    apply(model)
    applied = copies(router, hidden_states)
    assert applied == projection, f"stock {stock}, applied {applied}, of these up to the projection {projection}"
    # Stock widens the logits for its softmax, and per_expert_scale for the product.
    assert stock - applied == {"aten::_to_copy": 2, "aten::copy_": 2}


def copies(function, hidden_states):
    with torch.no_grad():
        function(hidden_states)  # the first call compiles or loads the kernel
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            function(hidden_states)
    return collections.Counter(e.name for e in trace.events() if re.fullmatch("aten::(_to_copy|copy_)", e.name))
