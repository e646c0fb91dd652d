"""RouterSpec: validated, printable, read from configs, and written to and from its key."""

import dataclasses
import json

import pytest
from transformers import (
    DeepseekV3Config,
    DeepseekV4Config,
    Gemma4Config,
    Gemma4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
)
from transformers import Qwen3MoeConfig as Qwen3

from turnout import RouterSpec
from turnout.families import KNOWN_MODEL_TYPES

GEMMA4 = Gemma4TextConfig(enable_moe_block=True, num_experts=128, top_k_experts=8, rms_norm_eps=1e-5)
SOFTMAX = {"num_experts": 24, "num_experts_per_tok": 4}


def spec(**fields):
    return RouterSpec(**{"num_experts": 8, "top_k": 2, **fields})


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"top_k": 9}, ValueError, r"top_k must lie in \[1, num_experts=8\], got 9"),
        ({"top_k": 0}, ValueError, r"top_k must lie in \[1, num_experts=8\], got 0"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"num_experts": 8.0}, TypeError, r"num_experts must be an int, got 8\.0"),
        ({"top_k": True}, TypeError, "top_k must be an int, got True"),
        ({"renormalize": 1}, TypeError, "renormalize must be True or False, got 1"),
        ({"scoring_func": "relu"}, ValueError, "scoring_func must be one of .*'softmax'.* got 'relu'"),
        ({"weights_rounding": "bf16"}, ValueError, "weights_rounding must be one of .* got 'bf16'"),
        ({"routed_scaling_factor": float("inf")}, TypeError, "routed_scaling_factor must be a finite number, got inf"),
        ({"renormalize_eps": "1e-20"}, TypeError, "renormalize_eps must be a finite number, got '1e-20'"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be above 0, or None for no cap"),
        ({"num_expert_group": 3}, ValueError, "num_expert_group must divide num_experts=8, got 3"),
        ({"num_expert_group": 4, "topk_group": 5}, ValueError, r"topk_group must lie in \[1, num_expert_group=4\]"),
        ({"num_null_experts": 8}, ValueError, r"num_null_experts must lie in \[0, num_experts=8\), got 8"),
        ({"num_shared_columns": -1}, ValueError, "num_shared_columns must not be negative"),
        ({"hash_routing": True, "e_score_correction_bias": True}, ValueError, "hash_routing contradicts"),
        ({"selected_score": "sigmoid"}, ValueError, "selected_score='sigmoid' contradicts scoring_func='softmax'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused(fields, error, match):
    with pytest.raises(error, match=match):
        spec(**fields)


def test_arguments_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        RouterSpec(8, 2)


def test_frozen_hashable_and_printed_by_what_is_stated():
    one = spec(renormalize=True, routed_scaling_factor=2.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.top_k = 3
    assert repr(one) == "RouterSpec(num_experts=8, top_k=2, renormalize=True, routed_scaling_factor=2.5)"
    assert eval(repr(one)) == one
    assert len({one, spec(renormalize=True, routed_scaling_factor=2.5), spec()}) == 2


@pytest.mark.parametrize(
    "one",
    [
        spec(),
        spec(renormalize=True, per_expert_scale=True, input_norm="rms_scale"),
        spec(
            scoring_func="sigmoid",
            e_score_correction_bias=True,
            num_expert_group=4,
            topk_group=2,
            renormalize_eps=1e-20,
        ),
        spec(logit_softcap=30.0, scoring_func="none", selected_score="softmax", sorted=False),
    ],
    ids=str,
)
def test_key_is_json_of_what_is_stated_and_reads_back(one):
    assert RouterSpec.from_key(one.key) == one
    assert set(json.loads(one.key)) == {"num_experts", "top_k"} | {
        field.name for field in dataclasses.fields(one) if field.init and getattr(one, field.name) != field.default
    }


def test_gemma4():
    want = RouterSpec(
        num_experts=128, top_k=8, input_norm="rms_scale", input_norm_eps=1e-5, renormalize=True, per_expert_scale=True
    )
    assert RouterSpec.from_config(GEMMA4) == want
    assert RouterSpec.from_config(Gemma4Config(text_config=GEMMA4)) == want, "the nested config"
    assert RouterSpec.from_config(GEMMA4.to_dict()) == want, "a config.json"
    assert RouterSpec.from_config(Gemma4Config(text_config=GEMMA4).to_dict()) == want, "a nested config.json"


@pytest.mark.parametrize(
    ("config", "renormalize", "rounding"),
    [
        (MixtralConfig(num_local_experts=24, num_experts_per_tok=4), True, "none"),
        (Qwen2MoeConfig(**SOFTMAX), False, "input"),
        (Qwen2MoeConfig(norm_topk_prob=True, **SOFTMAX), True, "input"),
        (Qwen3(**SOFTMAX), False, "input"),
        (Qwen3(norm_topk_prob=True, **SOFTMAX), True, "input"),
        (OlmoeConfig(**SOFTMAX), False, "input"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_softmax_families(config, renormalize, rounding):
    want = RouterSpec(num_experts=24, top_k=4, renormalize=renormalize, weights_rounding=rounding)
    assert RouterSpec.from_config(config) == want


def test_deepseek_v3():
    """tests/routing/test_transformers_routers.py holds every family to its class; this one is here to be read."""
    want = RouterSpec(
        num_experts=256, top_k=8, projection_dtype="float32", scoring_func="sigmoid", e_score_correction_bias=True,
        num_expert_group=8, topk_group=4, group_score="top2_sum", sorted=False, renormalize=True, renormalize_eps=1e-20,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    assert RouterSpec.from_config(DeepseekV3Config()) == want
    assert RouterSpec.from_config(DeepseekV3Config().to_dict()) == want, "a config.json"
    assert RouterSpec.from_config(DeepseekV3Config(), layer=3) == want, "its layers are alike"


def test_layers_of_deepseek_v4_differ():
    config = DeepseekV4Config()
    hashed, ranked = (RouterSpec.from_config(config, layer=layer) for layer in (2, 3))
    assert (hashed.hash_routing, hashed.e_score_correction_bias) == (True, False)
    assert (ranked.hash_routing, ranked.e_score_correction_bias) == (False, True)
    assert (ranked.scoring_func, ranked.score_dtype, ranked.routed_scaling_factor) == ("sqrtsoftplus", "input", 1.5)
    older = {**config.to_dict(), "mlp_layer_types": None, "num_hash_layers": 3}
    assert [RouterSpec.from_config(older, layer=layer) for layer in (2, 3)] == [hashed, ranked]


def test_numbers_by_layer():
    config = {"model_type": "hunyuan_v1_moe", "num_experts": [16, 8], "moe_topk": [2, 2]}
    assert RouterSpec.from_config(config, layer=1).num_experts == 8
    with pytest.raises(ValueError, match=r"num_experts of this hunyuan_v1_moe model differs .* no layer was given"):
        RouterSpec.from_config(config)
    alike = RouterSpec.from_config({**config, "num_experts": [16, 16]})
    assert (alike.num_experts, alike.top_k) == (16, 2)


@pytest.mark.parametrize(
    ("layer", "given"), [(None, "no layer was given"), (43, "layer 43 is none of its 43"), (-1, "layer -1")]
)
def test_a_layer_must_be_said_where_layers_differ(layer, given):
    with pytest.raises(ValueError, match=f"mlp_layer_types of this deepseek_v4 model differs.*{given}.*; pass layer="):
        RouterSpec.from_config(DeepseekV4Config(), layer=layer)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (PhimoeConfig(), "softmax over what comes near the best"),
        ({"model_type": "zaya"}, "depend on the router of the layer before"),
        ({"model_type": "inkling_mm_model", "text_config": {"model_type": "inkling_text"}}, "those of shared experts"),
    ],
    ids=["phimoe", "zaya", "inkling"],
)
def test_a_router_that_no_spec_expresses_says_why(config, why):
    with pytest.raises(ValueError, match=f"RouterSpec does not express the router of model type .*{why}"):
        RouterSpec.from_config(config)


def test_unknown_model_type_lists_what_is_known():
    with pytest.raises(
        ValueError, match=r"no router is known for model type 'llama'; known are .*gemma4_text"
    ) as error:
        RouterSpec.from_config(LlamaConfig())
    assert all(model_type in str(error.value) for model_type in KNOWN_MODEL_TYPES)


def test_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="this gemma4_text model has no Mixture-of-Experts layer"):
        RouterSpec.from_config(Gemma4TextConfig())
    with pytest.raises(ValueError, match="no Mixture-of-Experts layer"):
        RouterSpec.from_config(Gemma4Config())


def test_config_that_lacks_a_field_is_refused_by_name():
    with pytest.raises(ValueError, match="'olmoe' lacks num_experts or num_local_experts"):
        RouterSpec.from_config({"model_type": "olmoe", "num_experts_per_tok": 4})


@pytest.mark.parametrize("config", [{}, None, "google/gemma-4-26B-A4B-it"], ids=str)
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ValueError, match="no router is known for model type None"):
        RouterSpec.from_config(config)


def test_equal_specs_have_equal_keys_and_hashes():
    whole, decimal = (RouterSpec(num_experts=8, top_k=2, routed_scaling_factor=factor) for factor in (2, 2.0))
    assert whole == decimal
    assert whole.key == decimal.key
    assert hash(whole) == hash(decimal)


def test_a_factor_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="routed_scaling_factor must be a float32 number, got 1e\\+39"):
        RouterSpec(num_experts=8, top_k=2, routed_scaling_factor=1e39)
