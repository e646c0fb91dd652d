"""Parity with the routers that transformers runs: their own modules, with random weights."""

import functools
import importlib

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

import turnout
from turnout.families import KNOWN_MODEL_TYPES
from turnout.testing.checks import WEIGHTS_TOLERANCE

HIDDEN_SIZE, NUM_TOKENS, NUM_EXPERTS, TOP_K = 64, 16, 24, 4
GROUPS = {"n_group": 4, "topk_group": 2}
GEMMA = {"num_experts": NUM_EXPERTS, "top_k_experts": TOP_K}
FLAG, NO_FLAG = {"norm_topk_prob": True}, {"norm_topk_prob": False}
SIZES = {
    "hidden_size": HIDDEN_SIZE,
    "vocab_size": 96,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), TOP_K),
}

# module: router class, config class, and what else its configs say; each of these is a case.
CLASSES = {
    "afmoe": ("AfmoeTokenChoiceRouter", "AfmoeConfig", {"route_scale": 2.5}),
    "aria": ("AriaTextTopKRouter", "AriaTextConfig", {}),
    "axk1": ("AXK1TopkRouter", "AXK1Config", GROUPS, {**GROUPS, **NO_FLAG}),
    "axk2": ("AXK2TopkRouter", "AXK2Config", {}, GROUPS, NO_FLAG),
    "bailing_hybrid": (
        "BailingHybridTopkRouter", "BailingHybridConfig", {"num_expert_group": 4, "topk_group": 2},
        {"num_expert_group": 1, "topk_group": 1, "moe_renormalize": False},
    ),
    "beam": ("BeamTopKRouter", "BeamConfig", GROUPS, {**GROUPS, **NO_FLAG}),
    "cohere2_moe": ("Cohere2MoeTopKRouter", "Cohere2MoeConfig", {}, {"expert_selection_fn": "sigmoid"},
                    {"expert_selection_fn": "sigmoid", **NO_FLAG}),
    "dbrx": ("DbrxFFN", "DbrxConfig", {}, {"moe_normalize_expert_weights": None}),
    "deepseek_ocr2": ("DeepseekOcr2TextTopkRouter", "DeepseekOcr2TextConfig", {"num_experts_per_tok": TOP_K}),
    "deepseek_v2": (
        "DeepseekV2TopkRouter", "DeepseekV2Config", {"num_experts_per_tok": TOP_K},
        {"num_experts_per_tok": TOP_K, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, **GROUPS},
    ),
    "deepseek_v3": ("DeepseekV3TopkRouter", "DeepseekV3Config", GROUPS, {**GROUPS, **NO_FLAG}),
    "deepseek_v32": ("DeepseekV32TopkRouter", "DeepseekV32Config", GROUPS),
    "deepseek_v4": ("DeepseekV4TopKRouter", "DeepseekV4Config", {}),
    "diffusion_gemma": ("DiffusionGemmaTextRouter", "DiffusionGemmaTextConfig", GEMMA),
    "dots1": ("Dots1TopkRouter", "Dots1Config", {"n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}),
    "dots3_note": ("Dots3NoteTextTopkRouter", "Dots3NoteTextConfig", {}),
    "ernie4_5_moe": ("Ernie4_5_MoeTopKRouter", "Ernie4_5_MoeConfig", {}),
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoeMoeTopKRouter", "Ernie4_5_VLMoeTextConfig", {}),
    "exaone_moe": ("ExaoneMoeTopkRouter", "ExaoneMoeConfig", {}),
    "flex_olmo": ("FlexOlmoTopKRouter", "FlexOlmoConfig", {}),
    "flint": ("FlintTopKRouter", "FlintConfig", {}, NO_FLAG),
    "gemma4": ("Gemma4TextRouter", "Gemma4TextConfig", {"enable_moe_block": True, **GEMMA}),
    "glm4_moe": ("Glm4MoeTopkRouter", "Glm4MoeConfig", {}, GROUPS),
    "glm4_moe_lite": ("Glm4MoeLiteTopkRouter", "Glm4MoeLiteConfig", {}),
    "glm4v_moe": ("Glm4vMoeTextTopkRouter", "Glm4vMoeTextConfig", {}),
    "glm5_next": ("Glm5NextTextTopkRouter", "Glm5NextTextConfig", {}),
    "glm_moe_dsa": ("GlmMoeDsaTopkRouter", "GlmMoeDsaConfig", {}),
    "gpt_oss": ("GptOssTopKRouter", "GptOssConfig", {}),
    "granitemoe": ("GraniteMoeTopKRouter", "GraniteMoeConfig", {}),
    "granitemoe_swa": ("GraniteMoeSWATopKRouter", "GraniteMoeSWAConfig", {}),
    "granitemoehybrid": ("GraniteMoeHybridTopKRouter", "GraniteMoeHybridConfig", {}),
    "granitemoeshared": ("GraniteMoeSharedTopKRouter", "GraniteMoeSharedConfig", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Gate", "HunYuanMoEV1Config", {}),
    "hy_v3": ("HYV3TopKRouter", "HYV3Config", {}),
    "hy_v4": ("HYV4TopkRouter", "HYV4Config", {}),
    "inkling2": ("Inkling2TopKRouter", "Inkling2TextConfig", {}),
    "jamba": ("JambaTopKRouter", "JambaConfig", {}),
    "jetmoe": ("JetMoeTopKGating", "JetMoeConfig", {}),
    "kimi_linear": ("KimiLinearTopkRouter", "KimiLinearConfig", {}),
    "kolibri1": ("Kolibri1TopKRouter", "Kolibri1Config", {}, FLAG),
    "laguna": ("LagunaTopKRouter", "LagunaConfig", {}, {"moe_router_logit_softcapping": 2.0}),
    "lfm2_moe": ("Lfm2MoeTopKRouter", "Lfm2MoeConfig", {}, {"use_expert_bias": False, **NO_FLAG}),
    "llama4": ("Llama4Router", "Llama4TextConfig", {}),
    "longcat_flash": ("LongcatFlashTopkRouter", "LongcatFlashConfig", {"zero_expert_num": 8}),
    "mellum": ("MellumTopKRouter", "MellumConfig", {}),
    "mimo_v2_flash": ("MiMoV2FlashTopkRouter", "MiMoV2FlashConfig", {}),
    "minimax": ("MiniMaxTopKRouter", "MiniMaxConfig", {}),
    "minimax_m2": ("MiniMaxM2TopKRouter", "MiniMaxM2Config", {}),
    "minimax_m3_vl": ("MiniMaxM3VLTopKRouter", "MiniMaxM3VLTextConfig", {}),
    "mistral4": ("Mistral4TopkRouter", "Mistral4Config", {}, {**GROUPS, **NO_FLAG}),
    "mistral_large4": ("MistralLarge4TextTopkRouter", "MistralLarge4TextConfig", {}, GROUPS),
    "mixtral": ("MixtralTopKRouter", "MixtralConfig", {}),
    "muse_spark": ("MuseSparkTopkRouter", "MuseSparkTextConfig", {}),
    "nemotron_h": ("NemotronHTopkRouter", "NemotronHConfig", {}),
    "olmoe": ("OlmoeTopKRouter", "OlmoeConfig", {}),
    "openai_privacy_filter": ("OpenAIPrivacyFilterTopKRouter", "OpenAIPrivacyFilterConfig", {}),
    "qwen2_moe": ("Qwen2MoeTopKRouter", "Qwen2MoeConfig", {}, FLAG),
    "qwen3_5_moe": ("Qwen3_5MoeTopKRouter", "Qwen3_5MoeTextConfig", {}),
    "qwen3_moe": ("Qwen3MoeTopKRouter", "Qwen3MoeConfig", {}, FLAG),
    "qwen3_next": ("Qwen3NextTopKRouter", "Qwen3NextConfig", {}),
    "qwen3_vl_moe": ("Qwen3VLMoeTextTopKRouter", "Qwen3VLMoeTextConfig", {}),
    "qwen4_exp": ("Qwen4ExpTextTopKRouter", "Qwen4ExpTextConfig", {}),
    "solar_open": ("SolarOpenTopkRouter", "SolarOpenConfig", {}),
    "step3p7": ("Step3p7TopKRouter", "Step3p7TextConfig", {}),
    "unlimited_ocr": ("UnlimitedOcrTextTopkRouter", "UnlimitedOcrTextConfig", {}),
    # Further routers of these modules:
    "deepseek_v4/hashed": ("DeepseekV4HashRouter", "DeepseekV4Config", {}),
    "dots3_note/vision": ("Dots3NoteVisionTopKRouter", "Dots3NoteVisionConfig", {}),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerTextTopKRouter", "Qwen3OmniMoeTextConfig", {}),
    "qwen3_omni_moe/talker": ("Qwen3OmniMoeTalkerTextTopKRouter", "Qwen3OmniMoeTalkerTextConfig", {}),
}  # fmt: skip
CASES = [(name, dict(case)) for name, (_, _, *cases) in CLASSES.items() for case in cases]
EACH_CASE = pytest.mark.parametrize(
    ("name", "fields"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())) or "plain"
)
# In 16 bits these round between two steps, which no spec says: a sum, a quotient, the softplus. Two units in a weight.
ROUND_BETWEEN = {"cohere2_moe", "dbrx", "deepseek_v4", "deepseek_v4/hashed", "lfm2_moe", "mistral4"}
IN_FLOAT32 = {"hunyuan_v1_moe", "inkling2"}  # their projection is kept in float32 by the model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def class_of(module, name):
    if not hasattr(module, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name} in {module.__name__}")
    return getattr(module, name)


def config_of(name, fields):
    family = name.split("/")[0]
    try:
        module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    kind = class_of(module, CLASSES[name][1])
    config = kind()
    if name == "dots3_note/vision":
        config = config.per_layer_config[30]  # of 24 experts
        fields = {"hidden_size": HIDDEN_SIZE}
    elif name == "dbrx":
        fields = {"d_model": HIDDEN_SIZE, "ffn_config": {"moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K, **fields}}
        return kind(**fields)
    else:
        sizes = {field: size for field, size in SIZES.items() if getattr(config, field, None) is not None}
        fields = {**sizes, **fields}
    for field, value in fields.items():  # one by one: together, sizes of the attention are checked as well
        setattr(config, field, value)
    return config


def drawn_router(name, config, dtype):
    """The router with random weights, on a CPU, and its selection bias, if any, as it is loaded."""
    family = name.split("/")[0]
    kind = class_of(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), CLASSES[name][0])
    arguments = (HIDDEN_SIZE, NUM_EXPERTS, TOP_K) if name == "jetmoe" else (config,)
    router = kind(*arguments).to(torch.float32 if name in IN_FLOAT32 else dtype).eval()
    for parameter in router.parameters():
        is_scale = parameter.dim() == 1
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if is_scale else torch.nn.init.normal_(parameter, std=0.3)
    spec = turnout.RouterSpec.from_config(config, layer={"deepseek_v4": 5, "deepseek_v4/hashed": 0}.get(name))
    if not spec.e_score_correction_bias:
        return router, spec, None
    wide = spec.projection_dtype == "float32" or spec.score_dtype == "input"
    bias = (0.1 * torch.randn(spec.num_experts)).to(torch.float32 if wide else dtype)
    owner = router.moe_statics if hasattr(router, "moe_statics") else router
    if hasattr(owner, "e_score_correction_bias"):
        owner.e_score_correction_bias.data = bias.view(owner.e_score_correction_bias.shape)
    return router, spec, bias


def called(name, router, hidden_states, bias, input_ids):
    """Weights and ids of a router, whatever it takes and returns."""
    if name == "afmoe":
        return weights_and_ids(router(hidden_states[None], bias))
    if name in ("minimax_m2", "hy_v3", "dots3_note/vision") or (name == "lfm2_moe" and bias is not None):
        return weights_and_ids(router(hidden_states, bias))
    if name == "deepseek_v4/hashed":
        return weights_and_ids(router(hidden_states, input_ids))
    if name == "dbrx":
        return router.route_tokens_to_experts(router.router(hidden_states))
    if name == "llama4":
        scores, logits = router(hidden_states)
        ids = logits.topk(router.top_k).indices
        return scores.gather(1, ids), ids
    if name == "jetmoe":
        slots, _, gates, sizes, _ = router(hidden_states)
        experts = torch.arange(NUM_EXPERTS).repeat_interleave(torch.tensor(sizes))
        weights, ids = torch.empty_like(gates), torch.empty_like(experts)
        weights[slots], ids[slots] = gates, experts
        return weights.view(-1, TOP_K), ids.view(-1, TOP_K)
    return weights_and_ids(router(hidden_states))


def weights_and_ids(results):
    """Of what a router returns, in an order that has changed over the versions: the ids, and what has their shape."""
    (ids,) = [result for result in results if not result.is_floating_point()]
    (weights,) = [result for result in results if result.is_floating_point() and result.shape == ids.shape]
    return weights, ids


@functools.cache
def routed_by_transformers(index, dtype):
    """Spec, logits, inputs, weights and ids of one case; the same for each implementation of ours."""
    name, fields = CASES[index]
    torch.manual_seed(0)
    config = config_of(name, fields)
    router, spec, bias = drawn_router(name, config, dtype)
    if spec.hash_routing:
        router.tid2eid = torch.rand(96, NUM_EXPERTS).argsort(dim=1)[:, :TOP_K].contiguous()
    input_ids = torch.randint(96, (NUM_TOKENS,)) if spec.hash_routing else None
    logits = []
    with recorded_linear(logits):
        hidden_states = torch.randn(NUM_TOKENS, HIDDEN_SIZE).to(dtype)
        topk_weights, topk_ids = called(name, router, hidden_states, bias, input_ids)
    inputs = {
        "per_expert_scale": getattr(router, "per_expert_scale", None),
        "e_score_correction_bias": bias,
        "input_ids": input_ids,
        "tid2eid": router.tid2eid if spec.hash_routing else None,
    }
    return spec, logits[0], inputs, topk_weights, topk_ids


class recorded_linear(torch.overrides.TorchFunctionMode):
    """Keep what ``F.linear`` returns: a router's projection gives its logits, whatever the router returns."""

    def __init__(self, results):
        self.results = results

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear:
            self.results.append(result)
        return result


def routed_by_both(name, fields, dtype, impl, device):
    """Spec and logits, the router's weights and ids, and turnout's of the same logits; all but these on a CPU."""
    case = routed_by_transformers(CASES.index((name, fields)), dtype)
    spec, logits, inputs, topk_weights, topk_ids = case
    contract = turnout.Contract(ids_dtype=topk_ids.dtype, weights_dtype=topk_weights.dtype)
    inputs = turnout.RoutingInputs(
        **{k: tensor if tensor is None else tensor.to(device) for k, tensor in inputs.items()}
    )
    got = turnout.route(logits.to(device), spec, contract, inputs, impl=impl)
    return spec, logits, (topk_weights, topk_ids), (got.topk_weights.cpu(), got.topk_ids.cpu())


def by_expert(spec, weights, ids):
    """The weights [T, E]: order is not part of an answer that is not sorted."""
    return weights.new_zeros(NUM_TOKENS, spec.num_experts).scatter_(1, ids, weights)


@EACH_CASE
def test_float32_routing_is_the_models(name, fields, impl, device):
    spec, _, want, got = routed_by_both(name, fields, torch.float32, impl, device)
    assert torch.equal(*(ids.sort(dim=1).values for ids in (want[1], got[1])))
    if spec.sorted:
        assert torch.equal(want[1], got[1])
    assert_weights_equal(by_expert(spec, *got), by_expert(spec, *want))


@EACH_CASE
def test_bfloat16_routing_is_the_models_up_to_ties_at_the_boundary(name, fields, impl, device):
    """The sets of experts are equal but where the K-th and the next logit are: there any choice is right."""
    spec, logits, want, got = routed_by_both(name, fields, torch.bfloat16, impl, device)
    decided = torch.ones(NUM_TOKENS, dtype=torch.bool)
    if not (spec.e_score_correction_bias or spec.hash_routing):
        best = ranked_by_the_model(logits, spec).sort(dim=-1, descending=True).values
        decided = best[:, spec.top_k - 1] != best[:, spec.top_k]
    if name in ROUND_BETWEEN and spec.topk_group < spec.num_expert_group:
        decided &= groups_are_far_apart(logits, spec)
    assert decided.sum() >= 12  # of 16 rows
    ours, theirs = (by_expert(spec, *routing)[decided] for routing in (got, want))
    if name in ROUND_BETWEEN:
        assert torch.equal(ours != 0, theirs != 0)
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)
    else:
        assert_weights_equal(ours, theirs)


def groups_are_far_apart(logits, spec):
    """Whether rounding once more, as the model does between two steps, chooses the same groups."""
    groups = ranked_by_the_model(logits, spec).unflatten(1, (spec.num_expert_group, -1))
    size = {"max": 1, "top2_sum": 2}[spec.group_score]
    best = groups.topk(size, dim=-1).values.sum(dim=-1).sort(dim=-1, descending=True).values
    last, next_one = best[:, spec.topk_group - 1], best[:, spec.topk_group]
    return last - next_one > 2 * torch.finfo(torch.bfloat16).eps * last.abs()


def ranked_by_the_model(logits, spec):
    """Scores that a model rounds tie where its logits do not."""
    if spec.score_dtype == "input" and spec.scoring_func in ("sigmoid", "softmax"):
        logits = logits.sigmoid() if spec.scoring_func == "sigmoid" else logits.softmax(dim=-1)
    return logits.float()


def assert_weights_equal(got, want):
    """float32 weights within the tolerance; 16-bit weights were rounded where the model rounds: equal."""
    assert got.dtype == want.dtype
    assert torch.equal(got != 0, want != 0)
    tolerance = 3 * WEIGHTS_TOLERANCE * want.abs().clamp(min=1) if want.dtype == torch.float32 else 0
    assert ((got - want).abs() <= tolerance).all(), (got - want).abs().max()


def test_each_known_model_type_has_its_router_here():
    assert {config_of(name, fields).model_type for name, fields in CASES} == set(KNOWN_MODEL_TYPES)
