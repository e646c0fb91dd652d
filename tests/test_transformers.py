"""What apply, restore and explain do to a transformers model, and the contracts they choose."""

import collections
import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from gemma4_models import (
    drawn_conditional_generation,
    drawn_dense_gemma4,
    drawn_gemma4,
    drawn_gpt_oss,
    drawn_mixtral,
    logits_of,
    routers_of,
    states,
    text_ids,
)  # fmt: skip

import turnout
from turnout.integrations import transformers as integration
from turnout.integrations.transformers import apply, explain, restore
from turnout.routing.api import prepare, route_prepared
from turnout.testing.tiny import load_tiny_gemma4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return load_tiny_gemma4(experts_implementation="grouped_mm")


# What apply does, and its report


@pytest.mark.parametrize(
    ("implementation", "contract_name"),
    [
        ("eager", "transformers.eager"),
        ("batched_mm", "transformers.batched_mm"),
        ("grouped_mm", "transformers.grouped_mm.cpu"),
    ],
)
def test_apply_reports_each_layer_with_the_contract_of_the_experts_in_force(implementation, contract_name):
    model = load_tiny_gemma4(experts_implementation=implementation)
    report = apply(model)
    assert [row.path for row in report] == [f"model.layers.{i}.router" for i in range(6)]
    for row in report:
        assert (row.router, row.state) == ("Gemma4TextRouter", "replaced")
        assert (row.experts_implementation, row.contract_name) == (implementation, contract_name)
        assert row.contract == turnout.contracts[contract_name]
        assert row.impl == "cpu"
        assert row.reason


def test_the_report_prints_like_layers_once_with_their_number(model):
    text = str(apply(model))
    assert text.count("Gemma4TextRouter") == 1
    for part in ("6 replaced", "model.layers.*.router x 6", "grouped_mm", "ids int64, weights float32", "cpu"):
        assert part in text


def test_apply_restore_and_explain_change_what_they_say_and_nothing_else(model):
    before = [dict(vars(router)) for router in routers_of(model)]
    assert states(restore(model)) == {"stock"}
    assert states(explain(model)) == {"stock"}
    assert [dict(vars(router)) for router in routers_of(model)] == before

    assert states(apply(model)) == {"replaced"}
    applied = [dict(vars(router)) for router in routers_of(model)]
    assert states(apply(model)) == {"already replaced"}
    assert states(explain(model)) == {"replaced"}
    assert [dict(vars(router)) for router in routers_of(model)] == applied

    assert states(restore(model)) == {"restored"}
    assert [dict(vars(router)) for router in routers_of(model)] == before


def test_explain_says_before_apply_what_apply_will_choose(model):
    def choice(report):
        return [(row.path, row.contract, row.impl, row.reason) for row in report]

    assert choice(explain(model)) == choice(apply(model)) == choice(explain(model))


@pytest.mark.parametrize(
    ("build", "first_path"),
    [
        (drawn_conditional_generation, "model.language_model.layers.0.router"),
        (lambda: drawn_gemma4().model, "layers.0.router"),
        (lambda: drawn_gemma4().model.layers[1], "router"),
    ],
    ids=["conditional_generation", "text_model", "decoder_layer"],
)
def test_apply_finds_the_routers_of_any_module_that_contains_them(build, first_path):
    module = build()
    report = apply(module)
    assert report[0].path == first_path
    assert states(report) == {"replaced"}
    assert states(restore(module)) == {"restored"}


@pytest.mark.parametrize("function", [apply, restore, explain])
def test_what_has_no_routing_is_refused(function):
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        function("google/gemma-4-26B-A4B-it")
    with pytest.raises(ValueError, match="Gemma4ForCausalLM has no Mixture-of-Experts layer"):
        function(drawn_dense_gemma4())


def test_a_known_router_that_is_not_replaced_yet_is_explained_and_refused_by_name():
    model = drawn_mixtral()
    for row in explain(model):
        assert (row.state, row.contract, row.impl) == ("not supported", None, None)
        assert "MixtralTopKRouter is not replaced yet" in row.reason
        assert "RouterSpec(num_experts=4, top_k=2, renormalize=True)" in row.reason
    assert "layers.*.mlp.gate x 2" in str(explain(model))
    with pytest.raises(NotImplementedError, match="MixtralTopKRouter is not replaced yet"):
        apply(model)
    assert states(restore(model)) == {"not supported"}


def test_a_router_without_a_spec_is_explained_as_such():
    (row,) = explain(drawn_gpt_oss())
    assert "GptOssTopKRouter is not replaced yet; no RouterSpec is known" in row.reason


def test_a_forward_that_another_tool_set_stays(model):
    router = model.model.layers[2].router
    stock = router.forward
    router.forward = lambda hidden_states: stock(hidden_states)
    foreign = router.forward
    report = apply(model)
    assert collections.Counter(row.state for row in report) == {"replaced": 5, "not supported": 1}
    assert "another tool has set a forward" in report[2].reason
    assert collections.Counter(row.state for row in restore(model)) == {"restored": 5, "not supported": 1}
    assert router.forward is foreign


def test_a_subclass_with_a_forward_of_its_own_is_not_replaced():
    model = drawn_gemma4()
    router_class = type(model.model.layers[0].router)
    model.model.layers[0].router.__class__ = type("Router", (router_class,), {"forward": lambda self, x: x})
    report = apply(model)
    assert [row.state for row in report] == ["not supported", "replaced"]
    assert "has a forward of its own" in report[0].reason


def test_accelerate_hooks_keep_running_around_the_new_forward(model):
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    seen = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    ids = text_ids(20)
    stock = logits_of(model, ids)
    for router in routers_of(model):
        hooks.add_hook_to_module(router, Counting())
    assert states(apply(model)) == {"replaced"}
    torch.testing.assert_close(logits_of(model, ids), stock, rtol=0, atol=1e-4)
    assert len(seen) == 6
    assert routers_of(model)[0]._old_forward.__func__.__module__ == integration.__name__
    assert states(restore(model)) == {"restored"}
    assert torch.equal(logits_of(model, ids), stock)
    assert len(seen) == 12


# The contract follows the experts implementation


@pytest.mark.parametrize(
    ("implementation", "ids_dtype"),
    [("eager", torch.int64), ("batched_mm", torch.int64), ("grouped_mm", torch.int32), (None, torch.int64)],
)
def test_ids_have_the_dtype_that_the_experts_read_on_a_device_that_is_no_cpu(implementation, ids_dtype):
    model = drawn_gemma4().to("meta")
    apply(model)
    model.config._experts_implementation = implementation  # what set_experts_implementation and generate() do
    router = model.model.layers[0].router
    with torch.no_grad():
        _, weights, ids = router(torch.empty(5, 32, device="meta"))
    assert (ids.dtype, weights.dtype) == (ids_dtype, torch.float32)
    assert explain(model)[0].contract.ids_dtype == ids_dtype
    assert explain(model)[0].experts_implementation == (implementation or "eager")


def test_the_contract_is_chosen_at_each_call(model, monkeypatch):
    written = []

    def recording(router_logits, declarations, per_expert_scale):
        written.append(declarations)
        return route_prepared(router_logits, declarations, per_expert_scale)

    monkeypatch.setattr(integration, "route_prepared", recording)
    apply(model)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        written.clear()
        logits_of(model, text_ids(8))
        contract = explain(model)[0].contract
        assert set(written) == {prepare(turnout.RouterSpec.from_config(model.config), contract)}
        assert explain(model)[0].experts_implementation == implementation


def test_an_implementation_registered_by_others_gets_what_stock_routers_write(model):
    received = []

    def experts_forward(self, hidden_states, top_k_index, top_k_weights):
        received.append((top_k_index.dtype, top_k_weights.dtype))
        return torch.zeros_like(hidden_states)

    transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS.register("turnout_test", experts_forward)
    try:
        model.set_experts_implementation("turnout_test")
        (reason,) = {row.reason for row in apply(model)}
        logits_of(model, text_ids(8))
    finally:
        del transformers.integrations.moe.ExpertsInterface._global_mapping["turnout_test"]
    assert "not verified" in reason
    assert set(received) == {(torch.int64, torch.float32)}


@pytest.mark.parametrize("mark", ["flag", "forward"])
def test_parallel_experts_get_global_int64_ids_from_every_implementation(mark):
    model = drawn_gemma4().to("meta")
    for layer in model.model.layers:
        if mark == "flag":
            layer.experts._is_expert_parallel = True
        else:
            stock = layer.experts.forward
            layer.experts.forward = lambda *args, stock=stock: stock(*args)
    for row in apply(model):
        assert row.contract_name == "transformers.expert_parallel.all_to_all"
        assert "parallel" in row.reason
    with torch.no_grad():
        assert model.model.layers[0].router(torch.empty(5, 32, device="meta"))[2].dtype == torch.int64


# Parameters are the module's, at each call


def test_a_saved_model_reloads_as_stock(model, tmp_path):
    stock = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply(model)
    assert model.state_dict().keys() == stock.keys()
    model.save_pretrained(tmp_path)
    reloaded = transformers.Gemma4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert states(explain(reloaded)) == {"stock"}
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, stock[name]), name


def test_a_new_per_expert_scale_takes_effect_at_once(model):
    apply(model)
    router = routers_of(model)[0]
    hidden_states = torch.randn(4, 128)
    with torch.no_grad():
        _, weights, ids = router(hidden_states)
        router.per_expert_scale.mul_(2)
        assert torch.equal(router(hidden_states)[1], 2 * weights)
        router.per_expert_scale = nn.Parameter(torch.arange(32.0))
        torch.testing.assert_close(router(hidden_states)[1].sum(), (weights_to_one(router, hidden_states) * ids).sum())


def weights_to_one(router, hidden_states):
    ones = {"per_expert_scale": torch.ones(32)}
    return torch.func.functional_call(router, ones, (hidden_states,))[1]


def test_functional_call_routes_with_the_parameters_given(model):
    apply(model)
    router = routers_of(model)[0]
    hidden_states = torch.randn(4, 128)
    with torch.no_grad():
        torch.testing.assert_close(weights_to_one(router, hidden_states).sum(dim=-1), torch.ones(4))


def test_a_copy_routes_with_its_own_parameters(model):
    apply(model)
    twin = copy.deepcopy(model)
    assert states(explain(twin)) == {"replaced"}
    router, copied = routers_of(model)[0], routers_of(twin)[0]
    hidden_states = torch.randn(4, 128)
    with torch.no_grad():
        weights = router(hidden_states)[1]
        copied.per_expert_scale.zero_()
        assert torch.equal(copied(hidden_states)[1], torch.zeros_like(weights))
        assert torch.equal(router(hidden_states)[1], weights)
    restore(twin)
    assert states(explain(model)) == {"replaced"}


def test_a_pickled_model_loads_as_stock_and_can_be_applied_again(model):
    ids = text_ids(16)
    stock = logits_of(model, ids)
    apply(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"turnout.integrations" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert states(explain(loaded)) == {"stock"}
    assert torch.equal(logits_of(loaded, ids), stock)
    assert states(apply(loaded)) == {"replaced"}
    torch.testing.assert_close(logits_of(loaded, ids), stock, rtol=0, atol=1e-4)


def test_another_top_k_asks_for_apply_again(model):
    apply(model)
    ids = text_ids(16)
    model.config.top_k_experts = 2
    with pytest.raises(ValueError, match=r"top_k_experts is 2 and was 4 .* call it again"):
        logits_of(model, ids)
    assert states(apply(model)) == {"replaced"}
    applied = logits_of(model, ids)
    restore(model)
    torch.testing.assert_close(applied, logits_of(model, ids), rtol=0, atol=1e-4)


def test_importing_the_integration_imports_no_transformers():
    code = "import sys, turnout.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_float64_model_is_refused_in_a_sentence(model):
    model = model.double()
    model.set_experts_implementation("batched_mm")
    apply(model)
    with pytest.raises(ValueError, match=r"router_logits must be float32, bfloat16 or float16, got torch\.float64"):
        logits_of(model, text_ids(8))
