"""The router and the experts of each model family, as fields of `RouterSpec` and `ExpertsSpec`.

One function per family, one row per model type. Sources: the router and experts classes in ``transformers`` 5.23,
``models/<model type>/modeling_<model type>.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

Fields = dict[str, Any]


class _Config:
    """Reads a config object or the dict of a ``config.json`` alike, and names what is missing."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def get(self, name: str, default: Any = None) -> Any:
        if isinstance(self._config, Mapping):
            return self._config.get(name, default)
        return getattr(self._config, name, default)

    def require(self, *names: str) -> Any:
        for name in names:
            value = self.get(name)
            if value is not None:
                return value
        raise ValueError(
            f"the config of model type {self.get('model_type')!r} lacks {' or '.join(names)}, which its "
            "Mixture-of-Experts layer needs"
        )


def _gemma4(config: _Config) -> Fields:
    """Gemma 4: scaled RMSNorm, softmax over all, top-k, sum to 1, times a scale per expert; float32 weights."""
    if not config.get("enable_moe_block"):
        raise ValueError(
            f"this {config.get('model_type')} model has no Mixture-of-Experts layer (enable_moe_block is off), "
            "so there is no router to describe"
        )
    return {
        "num_experts": config.require("num_experts"),
        "top_k": config.require("top_k_experts"),
        "input_norm": "rms_scale",
        "input_norm_eps": config.get("rms_norm_eps", 1e-6),
        "renormalize": True,
        "per_expert_scale": True,
    }


def _mixtral(config: _Config) -> Fields:
    """Mixtral: softmax over all, top-k, sum to 1; the weights stay float32."""
    return {**_softmax_top_k(config), "renormalize": True, "weights_rounding": "none"}


def _qwen(config: _Config, norm_topk_prob: bool = False) -> Fields:
    """Qwen, OLMoE: softmax over all, top-k, sum to 1 if norm_topk_prob; weights in the logits' dtype."""
    return {**_softmax_top_k(config), "renormalize": bool(config.get("norm_topk_prob", norm_topk_prob))}


def _qwen3_5(config: _Config) -> Fields:
    """Qwen 3.5: as Qwen, and always summing to 1."""
    return {**_softmax_top_k(config), "renormalize": True}


def _softmax_top_k(config: _Config) -> Fields:
    """Softmax over all, top-k, the probabilities as they are; weights in the logits' dtype."""
    return {
        "num_experts": config.require("num_experts", "num_local_experts"),
        "top_k": config.require("num_experts_per_tok"),
        "weights_rounding": "input",
    }


_FAMILIES: dict[str, Callable[[_Config], Fields]] = {
    "gemma4_text": _gemma4,
    "mixtral": _mixtral,
    "minimax": _mixtral,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen,
    "qwen3_next": functools.partial(_qwen, norm_topk_prob=True),  # the default of its config
    "olmoe": _qwen,
    "flex_olmo": _qwen,
    "qwen3_5_moe_text": _qwen3_5,
    "jamba": _softmax_top_k,
}

KNOWN_MODEL_TYPES = tuple(sorted(_FAMILIES))


def spec_fields(config: Any) -> Fields:
    """The fields of `RouterSpec` that a model's config stands for; see `RouterSpec.from_config`."""
    reader = _Config(config)
    model_type = reader.get("model_type")
    if model_type in _FAMILIES:
        return _FAMILIES[model_type](reader)
    text_config = reader.get("text_config")
    if text_config is not None and _Config(text_config).get("model_type") in _FAMILIES:
        return spec_fields(text_config)
    raise ValueError(
        f"no router is known for model type {model_type!r}; known are {', '.join(KNOWN_MODEL_TYPES)} "
        "(and models that hold one of them as text_config). Describe another router with "
        "turnout.RouterSpec(num_experts=..., top_k=..., ...)."
    )


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


def _gated(config: _Config, activation: str = "hidden_act", limit: str | None = None) -> Fields:
    """``activation(gate) * up``; with a limit gate is clamped from above, up on both sides."""
    name = config.require(activation)
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"the config has {activation}={name!r}, which turnout.ExpertsSpec does not express; it does "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return {**_ACTIVATIONS[name], **({} if limit is None else {"activation_limit": config.require(limit)})}


def _swiglu(config: _Config, **fields: Any) -> Fields:
    """``silu(gate) * up``, whatever the config says of an activation."""
    return fields


def _clamped_swiglu(config: _Config, **fields: Any) -> Fields:
    """``gate * sigmoid(alpha * gate) * (up + 1)``, gate and up clamped before."""
    alpha, limit = config.require("swiglu_alpha"), config.require("swiglu_limit")
    return {"activation_alpha": alpha, "activation_limit": limit, "up_offset": 1.0, **fields}


def _silu_with_limit(config: _Config) -> Fields:
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
_EXPERTS_FAMILIES: dict[str, Callable[[_Config], Fields]] = {
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
    reader = _Config(config)
    model_type = reader.get("model_type")
    if model_type in _EXPERTS_FAMILIES:
        return _EXPERTS_FAMILIES[model_type](reader)
    text_config = reader.get("text_config")
    if text_config is not None and _Config(text_config).get("model_type") in _EXPERTS_FAMILIES:
        return experts_spec_fields(text_config)
    raise ValueError(
        f"no experts are known for model type {model_type!r}; known are {', '.join(KNOWN_EXPERTS_MODEL_TYPES)} "
        "(and models that hold one of them as text_config). Describe others with "
        "turnout.ExpertsSpec(activation=..., ...)."
    )
