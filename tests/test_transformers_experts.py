"""turnout as an experts implementation of transformers: in every class that can run it, against the class itself."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from transformers.activations import ACT2FN
from transformers_experts import HIDDEN, NUM_EXPERTS, drawn_experts, experts_classes

import turnout
from turnout.integrations import _transformers_experts as integration
from turnout.integrations._transformers_experts import experts_spec, register

NOT_EXPRESSED = {
    "NemotronHExperts": "have no gate",
    "MuseSparkExperts": "normalise the output of each expert",
    "Inkling2Experts": "have an _apply_gate of their own",
}
NAMES = sorted(experts_classes())
CLAMPED = {"activation_limit": 7.0, "activation_alpha": 1.702, "up_offset": 1.0}
SPECS = {
    "Gemma4TextExperts": {"activation": "gelu_tanh"},
    "DiffusionGemmaTextExperts": {"activation": "gelu_tanh"},
    "DeepseekV4Experts": {"activation_limit": 10.0},
    "Glm5NextTextExperts": {"activation_limit": 10.0},
    "HYV4Experts": {"activation_limit": 10.0},
    "AriaExperts": {"transposed": True},
    "GptOssExperts": {**CLAMPED, "transposed": True, "interleaved": True, "bias": True},
    "OpenAIPrivacyFilterExperts": {**CLAMPED, "transposed": True, "bias": True},
    "MiniMaxM3VLExperts": CLAMPED,
}
EACH = pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_EXPRESSED])


@pytest.fixture(autouse=True)
def _registered():
    torch.manual_seed(0)
    register()


def routed(num_tokens=9, top_k=3):
    """Hidden states, ids and weights as most routers of transformers give them."""
    ids = torch.rand(num_tokens, NUM_EXPERTS).topk(top_k).indices
    return torch.randn(num_tokens, HIDDEN), ids, torch.rand(num_tokens, top_k)


def run(experts, implementation, hidden_states, ids, weights):
    experts.config._experts_implementation_internal = implementation
    with torch.no_grad():
        return experts(hidden_states, ids, weights)


def test_the_version_has_the_classes_that_the_documentation_counts():
    counts = {"5.17": 55, "5.23": 65}
    version = ".".join(transformers.__version__.split(".")[:2])
    if version not in counts:
        pytest.skip(f"not counted for transformers {version}")
    assert len(NAMES) == counts[version]
    assert set(NOT_EXPRESSED) - set(NAMES) <= {"MuseSparkExperts", "Inkling2Experts"}


def test_the_documentation_lists_every_class_with_what_it_computes():
    table = (Path(__file__).parents[1] / "docs" / "TRANSFORMERS.md").read_text()
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    listed = {name: what for _, what, names, _ in rows for name in names.strip().split(", ")}
    for name in NAMES:
        assert ("refused" in listed[name.removesuffix("Experts")]) == (name in NOT_EXPRESSED), name


@EACH
def test_what_a_class_computes_is_read_from_the_class(name):
    assert experts_spec(drawn_experts(name)) == turnout.ExpertsSpec(**SPECS.get(name, {}))


@EACH
def test_float32_equals_the_class_itself(name):
    experts = drawn_experts(name)
    inputs = routed()
    torch.testing.assert_close(run(experts, "turnout", *inputs), run(experts, "eager", *inputs), rtol=1e-5, atol=2e-5)


@EACH
def test_bf16_is_as_close_to_float64_as_the_best_of_stock(name):
    """Twice the error of a plain run, in root mean square."""
    experts = drawn_experts(name, torch.bfloat16)
    hidden_states, ids, weights = routed()
    inputs = (hidden_states.bfloat16(), ids, weights.bfloat16())
    outputs = {each: run(experts, each, *inputs) for each in ("turnout", "grouped_mm", "eager")}
    exact = run(experts.double(), "eager", inputs[0].double(), ids, inputs[2].double())
    errors = {each: (output.double() - exact).pow(2).mean().sqrt().item() for each, output in outputs.items()}
    assert outputs["turnout"].dtype == torch.bfloat16
    assert errors["turnout"] <= 2 * min(errors["grouped_mm"], errors["eager"]), errors


@pytest.mark.parametrize("name", sorted(NOT_EXPRESSED))
def test_what_is_not_expressed_is_refused_with_the_class_and_what_to_use(name):
    if name not in NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with pytest.raises(NotImplementedError, match=rf"{name} {NOT_EXPRESSED[name]}.*set_experts_implementation\('grou"):
        run(drawn_experts(name), "turnout", *routed())


# What a class is read by


@pytest.mark.parametrize(
    ("activation", "fields"),
    [
        ("silu", {}),
        ("swish", {}),
        ("quick_gelu", {"activation_alpha": 1.702}),
        ("gelu", {"activation": "gelu"}),
        ("gelu_python", {"activation": "gelu"}),
        *[(name, {"activation": "gelu_tanh"}) for name in ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")],
        *[(name, {"activation": "gelu_tanh"}) for name in ("gelu_python_tanh", "gelu_accurate")],
    ],
)
def test_an_activation_is_known_by_its_class_and_computes_the_same(activation, fields):
    experts = drawn_experts("MixtralExperts")
    experts.act_fn = ACT2FN[activation]
    assert experts.config.hidden_act == "silu"  # the config's name for it is not looked at
    assert experts_spec(experts) == turnout.ExpertsSpec(**fields)
    inputs = routed()
    torch.testing.assert_close(run(experts, "turnout", *inputs), run(experts, "eager", *inputs), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ["relu", "relu2", "tanh", "gelu_10", "linear"])
def test_other_activations_are_refused_by_name(activation):
    experts = drawn_experts("MixtralExperts")
    experts.act_fn = ACT2FN[activation]
    with pytest.raises(NotImplementedError, match=f"have the activation {type(ACT2FN[activation]).__name__}, which"):
        run(experts, "turnout", *routed())


def test_a_gate_that_is_not_known_is_refused_and_an_inherited_one_is_not():
    class Inherits(experts_classes()["GptOssExperts"]):
        pass

    class Overrides(experts_classes()["MixtralExperts"]):
        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, dim=-1)[0]

    class GptOssExperts(experts_classes()["MixtralExperts"]):  # a name alone proves nothing
        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, dim=-1)[0]

    def of(kind, name):
        experts = drawn_experts(name)
        experts.__class__ = kind
        return experts

    assert experts_spec(of(Inherits, "GptOssExperts")).interleaved
    for kind in (Overrides, GptOssExperts):
        with pytest.raises(NotImplementedError, match="have an _apply_gate of their own"):
            experts_spec(of(kind, "MixtralExperts"))


def test_flags_that_contradict_the_gate_are_refused():
    experts = drawn_experts("MixtralExperts")
    experts.is_concatenated = False
    with pytest.raises(NotImplementedError, match="is_concatenated=False, which their _apply_gate contradicts"):
        experts_spec(experts)


# What a call takes


@pytest.mark.parametrize("ids_dtype", [torch.int16, torch.int32, torch.uint32, torch.int64])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ids_and_weights_of_any_dtype_are_read(ids_dtype, weights_dtype):
    experts = drawn_experts("Gemma4TextExperts")
    hidden_states, ids, weights = routed()
    weights = weights.to(weights_dtype)
    output = run(experts, "turnout", hidden_states, ids.to(ids_dtype), weights)
    torch.testing.assert_close(output, run(experts, "eager", hidden_states, ids, weights.float()), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["Gemma4TextExperts", "GptOssExperts"])
def test_slots_of_other_ranks_contribute_nothing(name):
    """Under expert parallelism: local ids, num_experts with weight 0 elsewhere."""
    experts = drawn_experts(name)
    experts._is_expert_parallel = True
    hidden_states, ids, weights = routed(17)
    off_rank = torch.rand(ids.shape) < 0.5
    off_rank[3] = True
    kept = weights.masked_fill(off_rank, 0.0)
    expected = run(experts, "eager", hidden_states, ids, kept)
    for sentinel in (NUM_EXPERTS, -1):
        output = run(experts, "turnout", hidden_states, ids.masked_fill(off_rank, sentinel), kept)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-5)
        assert (output[3] == 0).all()


def test_no_tokens_give_no_rows():
    hidden_states, ids, weights = routed()
    output = run(drawn_experts("MixtralExperts"), "turnout", hidden_states[:0], ids[:0], weights[:0])
    assert output.shape == (0, HIDDEN)


def test_gradients_are_refused_in_a_sentence():
    experts = drawn_experts("MixtralExperts")
    experts.config._experts_implementation_internal = "turnout"
    with pytest.raises(ValueError, match="requires grad, and turnout computes for inference only"):
        experts(*routed())


@pytest.mark.parametrize("name", ["Gemma4TextExperts", "GptOssExperts", "Lfm2MoeExperts", "DeepseekV4Experts"])
def test_it_compiles_as_one_graph_and_exports(name):
    torch.compiler.reset()
    experts = drawn_experts(name)
    inputs = routed()
    expected = run(experts, "turnout", *inputs)
    with torch.no_grad():
        compiled = torch.compile(experts, fullgraph=True, backend="eager")
        assert torch.equal(compiled(*inputs), expected)
        program = torch.export.export(experts, inputs, strict=False)
        assert torch.equal(program.module()(*inputs), expected)
    called = [node for node in program.graph.nodes if str(node.target).startswith("turnout.experts")]
    assert len(called) == 1
    assert experts_spec(experts).key in called[0].args


# Registration


def test_a_model_can_be_loaded_with_it(tmp_path):
    from gemma4_models import drawn_mixtral, logits_of

    stock = drawn_mixtral().eval()
    stock.save_pretrained(tmp_path)
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="turnout")
    ids = torch.randint(64, (2, 12))
    torch.testing.assert_close(logits_of(model, ids), logits_of(stock, ids), rtol=0, atol=1e-5)
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()


def test_fine_grained_fp8_experts_are_refused_and_not_unknown():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    with pytest.raises(NotImplementedError, match="hold fine-grained FP8 weights"):
        ALL_FP8_EXPERTS_FUNCTIONS["turnout"](torch.nn.Linear(2, 2), *routed())


def test_it_is_registered_under_one_name():
    assert transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS["turnout"] is integration.experts_forward
