"""ExpertsSpec.from_config: what a model's experts compute, held against the classes that compute it."""

import importlib

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import turnout
from turnout.experts_families import KNOWN_EXPERTS_MODEL_TYPES
from turnout.integrations._transformers_experts import experts_spec

GPT_OSS = turnout.ExpertsSpec(
    activation_alpha=1.702, activation_limit=7.0, up_offset=1.0, transposed=True, interleaved=True, bias=True
)


def config_of(model_type, **changes):
    """The config class's defaults; of a model whose part has this type, that part."""
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type](**changes)
    for folder in (model_type.removesuffix("_text"), model_type.removesuffix("_talker_text")):
        try:
            module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
        except ModuleNotFoundError:
            continue
        for config in vars(module).values():
            if isinstance(config, type) and getattr(config, "model_type", None) == model_type:
                return config(**changes)
    pytest.skip(f"this transformers has no model type {model_type}")


def experts_modules(config):
    """Each experts class of the config's model, without memory for its weights."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    for name, kind in vars(module).items():
        if isinstance(kind, type) and name.endswith("Experts") and hasattr(kind, "_apply_gate"):
            with torch.device("meta"):
                yield kind(config)


@pytest.mark.parametrize("model_type", KNOWN_EXPERTS_MODEL_TYPES)
def test_a_config_says_what_its_experts_compute(model_type):
    gemma4 = {"enable_moe_block": True, "num_experts": 4, "moe_intermediate_size": 8}
    changes = gemma4 if model_type == "gemma4_text" else {}
    config = config_of(model_type, **changes)
    modules = list(experts_modules(config))
    assert modules
    for module in modules:
        assert turnout.ExpertsSpec.from_config(config) == experts_spec(module)
        assert turnout.ExpertsSpec.from_config(config.to_dict()) == experts_spec(module)


@pytest.mark.parametrize("name", ["silu", "swish", "quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"])
def test_each_activation_is_the_one_of_that_name(name):
    config = config_of("qwen3_moe", hidden_act=name)
    (module,) = experts_modules(config)
    assert turnout.ExpertsSpec.from_config(config) == experts_spec(module)


def test_gemma4_and_gpt_oss():
    gemma4 = {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}}
    gemma4["text_config"] |= {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "silu"}
    assert turnout.ExpertsSpec.from_config(gemma4) == turnout.ExpertsSpec(activation="gelu_tanh")
    gpt_oss = {"model_type": "gpt_oss", "hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    assert turnout.ExpertsSpec.from_config(gpt_oss) == GPT_OSS


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "llama"}, "no experts are known for model type 'llama'; known are .*gemma4_text.*ExpertsSpec"),
        ({}, "no experts are known for model type None"),
        ({"model_type": "olmoe"}, "model type 'olmoe' lacks hidden_act, which its Mixture-of-Experts layer needs"),
        ({"model_type": "olmoe", "hidden_act": "relu"}, "hidden_act='relu', which .* not express; it does silu, swish"),
        ({"model_type": "gpt_oss", "swiglu_limit": 7.0}, "'gpt_oss' lacks swiglu_alpha"),
    ],
)
def test_what_is_not_known_is_refused(config, match):
    with pytest.raises(ValueError, match=match):
        turnout.ExpertsSpec.from_config(config)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"activation": "relu"}, ValueError, "activation must be one of .*'gelu_tanh'.*got 'relu'"),
        ({"activation": "gelu", "activation_alpha": 2.0}, ValueError, "activation_alpha=2.0 contradicts"),
        ({"activation_limit": 0.0}, ValueError, "activation_limit must be above 0, or None for no clamp"),
        ({"activation_limit": float("nan")}, TypeError, "activation_limit must be a finite number"),
        ({"transposed": 1}, TypeError, "transposed must be True or False, got 1"),
        ({"quantization": "w4a16"}, ValueError, "group_size=None contradicts quantization='w4a16'"),
        ({"group_size": 32}, ValueError, "group_size=32 contradicts quantization='none'"),
        ({"quantization": "w4a16", "group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
    ],
)
def test_fields_that_contradict_each_other(fields, error, match):
    with pytest.raises(error, match=match):
        turnout.ExpertsSpec(**fields)


def test_a_key_makes_the_spec_again():
    assert turnout.ExpertsSpec.from_key(GPT_OSS.key) == GPT_OSS
    assert hash(turnout.ExpertsSpec.from_key(GPT_OSS.key)) == hash(GPT_OSS)
    assert eval(repr(GPT_OSS), {"ExpertsSpec": turnout.ExpertsSpec}) == GPT_OSS
    assert turnout.ExpertsSpec() != GPT_OSS
