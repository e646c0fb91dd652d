"""What an applied model reads at each call: the contract of its experts, and the parameters of its modules."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from gemma4_models import drawn_gemma4, experts_states, logits_of, router_states, routers_of, text_ids

import turnout
from turnout.integrations import _transformers_router as router_module
from turnout.integrations.transformers import apply, explain, restore
from turnout.routing.api import prepare, route_prepared
from turnout.testing.tiny import load_tiny_gemma4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return load_tiny_gemma4(experts_implementation="grouped_mm")


# The contract follows the experts implementation


@pytest.mark.parametrize(
    ("implementation", "ids_dtype"),
    [
        ("turnout", torch.int32),
        ("eager", torch.int64),
        ("batched_mm", torch.int64),
        ("grouped_mm", torch.int32),
        (None, torch.int64),
    ],
)
def test_ids_have_the_dtype_that_the_experts_read_on_a_device_that_is_no_cpu(implementation, ids_dtype):
    model = drawn_gemma4().to("meta")
    apply(model)
    model.config._experts_implementation = implementation  # what set_experts_implementation and generate() do
    router = model.model.layers[0].router
    with torch.no_grad():
        _, weights, ids = router(torch.empty(5, 32, device="meta"))
    assert (ids.dtype, weights.dtype) == (ids_dtype, torch.float32)
    (row, *_) = explain(model)
    assert row.router.contract.ids_dtype == ids_dtype
    assert row.experts.implementation == (implementation or "eager")


def test_the_contract_is_chosen_at_each_call(model, monkeypatch):
    written = []

    def recording(router_logits, declarations, per_expert_scale):
        written.append(declarations)
        return route_prepared(router_logits, declarations, per_expert_scale)

    apply(model)
    monkeypatch.setattr(router_module, "route_prepared", recording)
    for implementation in ("turnout", "eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        written.clear()
        logits_of(model, text_ids(8))
        (row, *_) = explain(model)
        assert set(written) == {prepare(turnout.RouterSpec.from_config(model.config), row.router.contract)}
        assert row.experts.implementation == implementation


def test_an_implementation_registered_by_others_gets_what_stock_routers_write(model):
    received = []

    def experts_forward(self, hidden_states, top_k_index, top_k_weights):
        received.append((top_k_index.dtype, top_k_weights.dtype))
        return torch.zeros_like(hidden_states)

    transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS.register("turnout_test", experts_forward)
    try:
        model.set_experts_implementation("turnout_test")
        (reason,) = {row.router.reason for row in apply(model, experts=False)}
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
        assert row.router.contract_name == "transformers.expert_parallel.all_to_all"
        assert "parallel" in row.router.reason
    with torch.no_grad():
        assert model.model.layers[0].router(torch.empty(5, 32, device="meta"))[2].dtype == torch.int64


# Parameters are the module's, at each call


def test_a_saved_model_reloads_as_stock(model, tmp_path):
    stock = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply(model)
    assert model.state_dict().keys() == stock.keys()
    model.save_pretrained(tmp_path)
    reloaded = transformers.Gemma4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    report = explain(reloaded)
    assert router_states(report) == experts_states(report) == {"stock"}
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
    assert router_states(explain(twin)) == {"replaced"}
    router, copied = routers_of(model)[0], routers_of(twin)[0]
    hidden_states = torch.randn(4, 128)
    with torch.no_grad():
        weights = router(hidden_states)[1]
        copied.per_expert_scale.zero_()
        assert torch.equal(copied(hidden_states)[1], torch.zeros_like(weights))
        assert torch.equal(router(hidden_states)[1], weights)
    restore(twin)
    assert router_states(explain(model)) == {"replaced"}


def test_a_pickled_model_needs_no_module_of_turnout_and_can_be_applied_again(model):
    ids = text_ids(16)
    stock = logits_of(model, ids)
    apply(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"turnout.integrations" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    report = explain(loaded)
    assert (router_states(report), experts_states(report)) == ({"stock"}, {"replaced"})
    assert router_states(apply(loaded)) == {"replaced"}
    torch.testing.assert_close(logits_of(loaded, ids), stock, rtol=0, atol=1e-4)
    restore(loaded)
    assert torch.equal(logits_of(loaded, ids), stock)


def test_another_top_k_asks_for_apply_again(model):
    apply(model)
    ids = text_ids(16)
    model.config.top_k_experts = 2
    with pytest.raises(ValueError, match=r"top_k_experts is 2 and was 4 .* call it again"):
        logits_of(model, ids)
    assert router_states(apply(model)) == {"replaced"}
    applied = logits_of(model, ids)
    restore(model)
    torch.testing.assert_close(applied, logits_of(model, ids), rtol=0, atol=1e-4)


def test_importing_the_integration_imports_no_transformers():
    code = "import sys, turnout.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_float64_model_is_refused_in_a_sentence(model):
    model = model.double()
    apply(model)
    with pytest.raises(ValueError, match=r"router_logits must be float32, bfloat16 or float16, got torch\.float64"):
        logits_of(model, text_ids(8))
