"""The experts of each model family, as fields of `ExpertsSpec`.

One function per form, one row per model type. Sources: the experts classes in ``transformers`` 5.23,
``models/<model type>/modeling_<model type>.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from turnout.families import Config, Fields

_ACTIVATIONS: dict[str, Fields] = {
    "silu": {"activation": "silu"},
    "swish": {"activation": "silu"},
    "quick_gelu": {"activation": "silu", "activation_alpha": 1.702},
    "gelu": {"activation": "gelu"},
    "gelu_pytorch_tanh": {"activation": "gelu_tanh"},
    "gelu_python_tanh": {"activation": "gelu_tanh"},
    "gelu_new": {"activation": "gelu_tanh"},
    "gelu_fast": {"activation": "gelu_tanh"},
    "gelu_accurate": {"activation": "gelu_tanh"},
}  # by the names that transformers knows them by; those of gelu_tanh write one formula differently


def _gated(config: Config, activation: str = "hidden_act", limit: str | None = None) -> Fields:
    """``activation(gate) * up``; with a limit gate is clamped from above, up on both sides."""
    name = config.require(activation)
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"the config has {activation}={name!r}, which turnout.ExpertsSpec does not express; it does "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return {**_ACTIVATIONS[name], **({} if limit is None else {"activation_limit": config.require(limit)})}


def _swiglu(config: Config, **fields: Any) -> Fields:
    """``silu(gate) * up``, whatever the config says of an activation."""
    return fields


def _clamped_swiglu(config: Config, **fields: Any) -> Fields:
    """``gate * sigmoid(alpha * gate) * (up + 1)``, gate and up clamped before."""
    alpha, limit = config.require("swiglu_alpha"), config.require("swiglu_limit")
    return {"activation_alpha": alpha, "activation_limit": limit, "up_offset": 1.0, **fields}


def _silu_with_limit(config: Config) -> Fields:
    """``silu(gate) * up``, gate and up clamped before."""
    return {"activation_limit": config.require("swiglu_limit")}


_GATED_BY_HIDDEN_ACT = (
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2_text", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe_text", "glm_moe_dsa", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "inkling_text", "jamba", "kimi_linear", "kolibri1", "laguna",
    "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "mistral4", "mistral_large4_text", "mixtral", "olmoe", "phimoe",
    "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe_talker_text", "qwen3_omni_moe_text",
    "qwen3_vl_moe_text", "qwen4_exp_text", "solar_open", "unlimited_ocr_text", "zaya",
)  # fmt: skip
_EXPERTS_FAMILIES: dict[str, Callable[[Config], Fields]] = {
    **dict.fromkeys(_GATED_BY_HIDDEN_ACT, _gated),
    "gemma4_text": functools.partial(_gated, activation="hidden_activation"),
    "deepseek_v4": functools.partial(_gated, limit="swiglu_limit"),
    "lfm2_moe": _swiglu,
    "aria_text": functools.partial(_swiglu, transposed=True),
    "glm5_next_text": _silu_with_limit,
    "hy_v4": _silu_with_limit,
    "minimax_m3_vl_text": _clamped_swiglu,
    "gpt_oss": functools.partial(_clamped_swiglu, transposed=True, interleaved=True, bias=True),
    "openai_privacy_filter": functools.partial(_clamped_swiglu, transposed=True, bias=True),
}

KNOWN_EXPERTS_MODEL_TYPES = tuple(sorted(_EXPERTS_FAMILIES))


def experts_spec_fields(config: Any) -> Fields:
    """The fields of `ExpertsSpec` that a model's config stands for; see `ExpertsSpec.from_config`."""
    reader = Config(config)
    model_type = reader.get("model_type")
    if model_type in _EXPERTS_FAMILIES:
        return _EXPERTS_FAMILIES[model_type](reader)
    text_config = reader.get("text_config")
    if text_config is not None and Config(text_config).get("model_type") in _EXPERTS_FAMILIES:
        return experts_spec_fields(text_config)
    raise ValueError(
        f"no experts are known for model type {model_type!r}; known are {', '.join(KNOWN_EXPERTS_MODEL_TYPES)} "
        "(and models that hold one of them as text_config). Describe others with "
        "turnout.ExpertsSpec(activation=..., ...)."
    )
