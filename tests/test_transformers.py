"""What apply, restore and explain do to a transformers model, and the contracts they choose."""

import collections

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from gemma4_models import (
    drawn_conditional_generation,
    drawn_dense_gemma4,
    drawn_gemma4,
    drawn_gpt_oss,
    drawn_mixtral,
    drawn_nemotron_h,
    drawn_phimoe,
    experts_states,
    logits_of,
    router_states,
    routers_of,
    text_ids,
)  # fmt: skip

import turnout
from turnout.integrations import transformers as integration
from turnout.integrations._transformers_router import is_router_replaced
from turnout.integrations.compressed_tensors import QuantizedExperts
from turnout.integrations.transformers import apply, explain, restore
from turnout.testing.tiny import load_tiny_gemma4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return load_tiny_gemma4(experts_implementation="grouped_mm")


# What apply does, and its report


def test_apply_reports_router_and_experts_of_each_layer(model):
    report = apply(model)
    assert [row.path for row in report] == [f"model.layers.{i}" for i in range(6)]
    for row in report:
        assert (row.router.kind, row.router.state, row.router.impl) == ("Gemma4TextRouter", "replaced", "cpu")
        assert row.router.contract_name == "turnout.transformers"
        assert row.router.contract == turnout.contracts["turnout.transformers"]
        assert (row.experts.kind, row.experts.state, row.experts.impl) == ("Gemma4TextExperts", "replaced", "cpu")
        assert row.experts.implementation == "turnout"
        assert row.experts.spec == turnout.ExpertsSpec(activation="gelu_tanh")
        assert row.router.reason
        assert row.experts.reason


@pytest.mark.parametrize(
    ("implementation", "contract_name"),
    [
        ("eager", "transformers.eager"),
        ("batched_mm", "transformers.batched_mm"),
        ("grouped_mm", "transformers.grouped_mm.cpu"),
    ],
)
def test_routers_alone_write_what_the_experts_in_force_read(implementation, contract_name):
    model = load_tiny_gemma4(experts_implementation=implementation)
    report = apply(model, experts=False)
    assert (router_states(report), experts_states(report)) == ({"replaced"}, {"stock"})
    assert model.config._experts_implementation == implementation
    for row in report:
        assert (row.experts.implementation, row.router.contract_name) == (implementation, contract_name)
        assert row.router.contract == turnout.contracts[contract_name]


def test_the_report_prints_like_layers_once_with_their_number(model):
    text = str(apply(model))
    assert text.count("Gemma4TextRouter") == text.count("Gemma4TextExperts") == 1
    head = "Mixture-of-Experts layers: 6; routers: 6 replaced; experts: 6 replaced"
    for part in (head, "model.layers.* x 6", "turnout.transformers: ids int32, weights float32", "gelu_tanh", "cpu"):
        assert part in text


def test_apply_restore_and_explain_change_what_they_say_and_nothing_else(model):
    def attributes():
        return [dict(vars(module)) for module in model.modules()], model.config._experts_implementation

    before = attributes()
    for report in (restore(model), explain(model)):
        assert (router_states(report), experts_states(report)) == ({"stock"}, {"stock"})
    assert attributes() == before

    assert experts_states(apply(model)) == {"replaced"}
    applied = attributes()
    report = apply(model)
    assert (router_states(report), experts_states(report)) == ({"already replaced"}, {"already replaced"})
    assert router_states(explain(model)) == experts_states(explain(model)) == {"replaced"}
    assert attributes() == applied

    report = restore(model)
    assert (router_states(report), experts_states(report)) == ({"restored"}, {"restored"})
    assert attributes() == before


def test_explain_says_before_apply_what_apply_will_choose(model):
    def choice(report):
        return [
            (row.path, row.router.contract, row.router.impl, row.router.reason, row.experts.spec, row.experts.reason)
            for row in report
        ]

    assert choice(explain(model)) == choice(apply(model)) == choice(explain(model))


def test_experts_can_follow_routers_and_restore_takes_both(model):
    apply(model, experts=False)
    report = apply(model)
    assert (router_states(report), experts_states(report)) == ({"already replaced"}, {"replaced"})
    report = apply(model, experts=False)
    assert (router_states(report), experts_states(report)) == ({"already replaced"}, {"replaced"})
    restore(model)
    assert model.config._experts_implementation == "grouped_mm"


def test_an_implementation_chosen_by_others_stays(model):
    apply(model)
    model.set_experts_implementation("batched_mm")
    assert experts_states(explain(model)) == {"stock"}
    assert explain(model)[0].router.contract_name == "transformers.batched_mm"
    report = restore(model)
    assert (router_states(report), experts_states(report)) == ({"restored"}, {"stock"})
    assert model.config._experts_implementation == "batched_mm"


def test_a_model_loaded_with_turnouts_experts_keeps_them():
    integration.register()
    model = load_tiny_gemma4(experts_implementation="turnout")
    report = apply(model)
    assert (router_states(report), experts_states(report)) == ({"replaced"}, {"already replaced"})
    report = restore(model)
    assert (router_states(report), experts_states(report)) == ({"restored"}, {"replaced"})
    assert model.config._experts_implementation == "turnout"


@pytest.mark.parametrize("part_first", [True, False])
def test_configs_of_the_whole_and_of_its_parts_change_and_come_back(part_first):
    model = drawn_conditional_generation()

    def implementations():
        return model.get_experts_implementation()

    before = implementations()
    if part_first:
        apply(model.model.language_model.layers[1])
    apply(model)
    assert implementations()[""] == implementations()["text_config"] == "turnout"  # generate() looks at each
    restore(model)
    assert implementations() == before


@pytest.mark.parametrize(
    ("build", "first_path"),
    [
        (drawn_conditional_generation, "model.language_model.layers.0"),
        (lambda: drawn_gemma4().model, "layers.0"),
        (lambda: drawn_gemma4().model.layers[1], ""),
    ],
    ids=["conditional_generation", "text_model", "decoder_layer"],
)
def test_apply_finds_the_layers_of_any_module_that_contains_them(build, first_path):
    module = build()
    report = apply(module)
    assert report[0].path == first_path
    assert router_states(report) == experts_states(report) == {"replaced"}
    report = restore(module)
    assert router_states(report) == experts_states(report) == {"restored"}


@pytest.mark.parametrize("function", [apply, restore, explain])
def test_what_has_no_routing_is_refused(function):
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        function("google/gemma-4-26B-A4B-it")
    with pytest.raises(ValueError, match="Gemma4ForCausalLM has no Mixture-of-Experts layer"):
        function(drawn_dense_gemma4())


def test_experts_are_replaced_where_the_router_is_not_yet():
    model = drawn_mixtral()
    for row in apply(model):
        assert (row.router.state, row.router.contract, row.router.impl) == ("not supported", None, None)
        assert "MixtralTopKRouter is not replaced yet" in row.router.reason
        assert "RouterSpec(num_experts=4, top_k=2, renormalize=True)" in row.router.reason
        assert (row.experts.state, row.experts.spec) == ("replaced", turnout.ExpertsSpec())
    assert "layers.*.mlp x 2" in str(explain(model))
    assert experts_states(restore(model)) == {"restored"}


def test_quantised_experts_that_turnout_loaded_stay_and_read_short_ids():
    model = drawn_gemma4(implementation="eager")
    weights = turnout.ExpertsWeights(*(torch.zeros(1, dtype=torch.int8) for _ in range(2)), None, None, *torch.ones(2))
    for layer in model.model.layers:
        layer.experts = QuantizedExperts(turnout.ExpertsSpec(quantization="w8a8_int8"), weights)
    for row in apply(model):
        assert (row.router.state, row.router.contract_name) == ("replaced", "turnout.transformers")
        assert (row.experts.state, row.experts.reason) == (
            "not supported",
            "turnout.load_quantized has put turnout's experts there",
        )
    assert model.config._experts_implementation == "eager"
    with torch.no_grad():
        assert model.model.layers[0].router(torch.randn(3, 32))[2].dtype == torch.int32


def test_where_nothing_can_be_replaced_apply_refuses_by_name():
    with pytest.raises(NotImplementedError, match="MixtralForCausalLM: router class MixtralTopKRouter is not replaced"):
        apply(drawn_mixtral(), experts=False)
    model = drawn_nemotron_h()
    with pytest.raises(NotImplementedError, match=r"NemotronHTopkRouter is not replaced.*Experts have no gate"):
        apply(model)
    (row,) = explain(model)
    assert (row.experts.state, row.experts.spec, row.experts.impl) == ("not supported", None, None)


def test_a_router_is_explained_by_its_spec_and_one_without_as_such():
    (row,) = explain(drawn_gpt_oss())
    assert "GptOssTopKRouter is not replaced yet; what it computes is known: RouterSpec(" in row.router.reason
    (row,) = explain(drawn_phimoe())
    assert "PhimoeTopKRouter is not replaced yet; its config does not say its RouterSpec" in row.router.reason


def test_a_forward_that_another_tool_set_stays(model):
    router = model.model.layers[2].router
    stock = router.forward
    router.forward = lambda hidden_states: stock(hidden_states)
    foreign = router.forward
    report = apply(model)
    assert collections.Counter(row.router.state for row in report) == {"replaced": 5, "not supported": 1}
    assert "another tool has set a forward" in report[2].router.reason
    report = restore(model)
    assert collections.Counter(row.router.state for row in report) == {"restored": 5, "not supported": 1}
    assert router.forward is foreign


def test_a_subclass_with_a_forward_of_its_own_is_not_replaced():
    model = drawn_gemma4()
    router_class = type(model.model.layers[0].router)
    model.model.layers[0].router.__class__ = type("Router", (router_class,), {"forward": lambda self, x: x})
    report = apply(model)
    assert [row.router.state for row in report] == ["not supported", "replaced"]
    assert "has a forward of its own" in report[0].router.reason


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
    assert router_states(apply(model)) == {"replaced"}
    torch.testing.assert_close(logits_of(model, ids), stock, rtol=0, atol=1e-4)
    assert len(seen) == 6
    assert is_router_replaced(routers_of(model)[0])
    assert router_states(restore(model)) == {"restored"}
    assert torch.equal(logits_of(model, ids), stock)
    assert len(seen) == 12
