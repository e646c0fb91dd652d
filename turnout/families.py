"""The router of each model family, as fields of `RouterSpec`.

One function per family, one row per model type. Sources: the router classes in ``transformers`` 5.23,
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
            f"the config of model type {self.get('model_type')!r} lacks {' or '.join(names)}, which its router needs"
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
