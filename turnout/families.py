"""The router of each model family, as fields of `RouterSpec`.

One function per family, one row per model type. Sources: the router classes in ``transformers`` 5.23,
``models/<model type>/modeling_<model type>.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Fields = dict[str, Any]


class Config:
    """Reads a config object or the dict of a ``config.json`` alike, for one layer, and names what is missing."""

    def __init__(self, config: Any, layer: int | None = None) -> None:
        self._config, self._layer = config, layer

    def get(self, name: str, default: Any = None) -> Any:
        """The value under this name."""
        if isinstance(self._config, Mapping):
            return self._config.get(name, default)
        return getattr(self._config, name, default)

    def require(self, *names: str) -> Any:
        """The first of these names that the config has; a list holds a value for each layer."""
        for name in names:
            value = self.get(name)
            if value is not None:
                return self.of_layer(name, value) if isinstance(value, list | tuple) else value
        raise ValueError(
            f"the config of model type {self.get('model_type')!r} lacks {' or '.join(names)}, which its "
            "Mixture-of-Experts layer needs"
        )

    def of_layer(self, name: str, values: Sequence[Any]) -> Any:
        """The value of the layer in question, or of all where they are equal."""
        if self._layer is not None and 0 <= self._layer < len(values):
            return values[self._layer]
        if self._layer is None and values and all(value == values[0] for value in values):
            return values[0]
        given = "no layer was given" if self._layer is None else f"layer {self._layer} is none of its {len(values)}"
        raise ValueError(
            f"{name} of this {self.get('model_type')} model differs from layer to layer, and {given}; "
            "pass layer=, counted from 0"
        )


def _sizes(config: Config) -> Fields:
    """E and K, under the names that configs have for them."""
    return {
        "num_experts": config.require("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        "top_k": config.require("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    }


def _gemma4(config: Config) -> Fields:
    """Gemma 4: scaled RMSNorm, softmax over all, top-k, sum to 1, times a scale per expert; float32 weights."""
    if config.get("model_type") == "gemma4_text" and not config.get("enable_moe_block"):
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


def _softmax(config: Config, **fields: Any) -> Fields:
    """Softmax over all, top-k, the probabilities as they are; weights in the logits' dtype."""
    return {**_sizes(config), "weights_rounding": "input", **fields}


def _mixtral(config: Config, **fields: Any) -> Fields:
    """Mixtral: softmax over all, top-k, sum to 1; the weights stay float32."""
    return {**_sizes(config), "renormalize": True, **fields}


def _qwen(config: Config, norm_topk_prob: bool = False) -> Fields:
    """Qwen, OLMoE: softmax over all, top-k, sum to 1 if norm_topk_prob; weights in the logits' dtype."""
    return _softmax(config, renormalize=bool(config.get("norm_topk_prob", norm_topk_prob)))


def _dbrx(config: Config) -> Fields:
    """DBRX: softmax in the logits' dtype, top-k, divided by a p-norm, in float32 up to the last rounding here."""
    ffn = Config(config.require("ffn_config"))
    order = ffn.get("moe_normalize_expert_weights", 1.0)
    fields = {} if order is None else {"renormalize": True, "renormalize_order": order}
    return {**_softmax(ffn, score_dtype="input"), **fields}


def _top_k_softmax(config: Config, **fields: Any) -> Fields:
    """Top-k of the logits, softmax of these; weights in the logits' dtype."""
    return _softmax(config, scoring_func="none", selected_score="softmax", **fields)


def _privacy_filter(config: Config) -> Fields:
    """OpenAI's privacy filter: as gpt-oss, in float32, and divided by K."""
    fields = {"router_bias": True, "projection_dtype": "float32", "weights_rounding": "none", "divide_by_top_k": True}
    return {**_top_k_softmax(config), **fields}


def _cohere2(config: Config) -> Fields:
    """Cohere 2: top-k of the logits, softmax of these, or sigmoid, then summing to 1 if norm_topk_prob."""
    if config.require("expert_selection_fn") == "softmax":
        return _top_k_softmax(config)
    renormalize = bool(config.require("norm_topk_prob"))
    return _softmax(config, scoring_func="sigmoid", score_dtype="input", renormalize=renormalize)


def _llama4(config: Config) -> Fields:
    """Llama 4: top-k of the logits, sigmoid of these; the weight multiplies the input of the expert."""
    return _softmax(config, scoring_func="none", selected_score="sigmoid", apply_router_weight_on="input")


def _kolibri(config: Config) -> Fields:
    """Kolibri: top-k of logit plus bias, sigmoid of the logit, summing to 1 if norm_topk_prob."""
    return {
        **_sizes(config),
        "projection_dtype": "float32",
        "scoring_func": "none",
        "e_score_correction_bias": True,
        "selected_score": "sigmoid",
        "renormalize": bool(config.require("norm_topk_prob")),
    }


def _sigmoid(config: Config, eps: float = 0.0, factor: str | None = None, **fields: Any) -> Fields:
    """Sigmoid, top-k of score plus bias, the score divided by the sum, times a factor."""
    return {
        **_sizes(config),
        "scoring_func": "sigmoid",
        "e_score_correction_bias": True,
        "renormalize": True,
        "renormalize_eps": eps,
        "routed_scaling_factor": 1.0 if factor is None else config.require(factor),
        **fields,
    }


def _hy_v3(config: Config) -> Fields:
    """Hunyuan 3: sigmoid in float32 plus bias, divided by the sum, times a factor."""
    return _sigmoid(config, 1e-20, "router_scaling_factor", projection_dtype="float32", sorted=False)


def _dots3_vision(config: Config) -> Fields:
    """dots3's vision encoder: as Hunyuan 3, with more experts from layer to layer; from the config object of one."""
    if isinstance(config.get("per_layer_config"), Mapping):
        raise ValueError(
            f"the layers of a {config.get('model_type')} differ in size; pass the config object of one, "
            "config.per_layer_config[layer]"
        )
    return _hy_v3(config)


def _laguna(config: Config) -> Fields:
    """Laguna: sigmoid of capped logits plus bias; weights in the logits' dtype."""
    softcap = config.get("moe_router_logit_softcapping") or None  # 0: none
    return _sigmoid(config, logit_softcap=softcap, weights_rounding="input")


def _muse_spark(config: Config) -> Fields:
    """Muse Spark: sigmoid of scaled logits plus bias, in float32."""
    scale = config.require("output_multiplier")
    return _sigmoid(config, 1e-15, "routed_scaling_factor", logit_scale=scale, projection_dtype="float32", sorted=False)


def _lfm2(config: Config) -> Fields:
    """LFM 2: sigmoid in the logits' dtype, a bias if use_expert_bias, divided by the sum if norm_topk_prob."""
    return _sigmoid(
        config,
        1e-6,
        "routed_scaling_factor",
        score_dtype="input",
        e_score_correction_bias=bool(config.require("use_expert_bias")),
        renormalize=bool(config.require("norm_topk_prob")),
        weights_rounding="input",
    )


def _flint(config: Config) -> Fields:
    """Flint: sigmoid in float32, no bias, summing to 1 if norm_topk_prob."""
    renormalize = bool(config.require("norm_topk_prob"))
    return _sigmoid(config, projection_dtype="float32", e_score_correction_bias=False, renormalize=renormalize)


def _deepseek_v3(config: Config, **fields: Any) -> Fields:
    """DeepSeek V3: sigmoid in float32 plus bias, the best groups by their two best, summing to 1 if norm_topk_prob."""
    return {
        **_sigmoid(config, 1e-20, "routed_scaling_factor", projection_dtype="float32", sorted=False),
        **_groups(config, "top2_sum"),
        "renormalize": bool(config.require("norm_topk_prob", "moe_renormalize")),
        **fields,
    }


def _groups(config: Config, group_score: str, **fields: Any) -> Fields:
    """Groups of experts, where there is more than one."""
    num_groups = config.require("n_group", "num_expert_group")
    if num_groups == 1:
        return {}
    return {
        "num_expert_group": num_groups, "topk_group": config.require("topk_group"), "group_score": group_score, **fields
    }  # fmt: skip


def _axk2(config: Config) -> Fields:
    """A.X K2: as DeepSeek V3, groups if any; experts outside of them count as 0."""
    if config.get("n_group") is None:
        fields = _sigmoid(config, 1e-20, "routed_scaling_factor", projection_dtype="float32", sorted=False)
        return {**fields, "renormalize": bool(config.require("norm_topk_prob"))}
    return _deepseek_v3(config, **_groups(config, "top2_sum", group_fill="zero"))


def _deepseek_v2(config: Config) -> Fields:
    """DeepSeek V2: softmax in float32, the best groups by their best if group_limited_greedy, times a factor."""
    method = config.require("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method={method!r} of {config.get('model_type')} is not known")
    groups = {} if method == "greedy" else _groups(config, "max", group_fill="zero")
    factor = config.require("routed_scaling_factor")
    return {**_sizes(config), "projection_dtype": "float32", "routed_scaling_factor": factor, "sorted": False, **groups}


def _mistral_large4(config: Config, **fields: Any) -> Fields:
    """Mistral Large 4: softmax in float32, the best groups by their two best, divided by the sum, times a factor."""
    return {
        **_sizes(config),
        "projection_dtype": "float32",
        **_groups(config, "top2_sum", group_fill="zero"),
        "sorted": False,
        "renormalize": True,
        "renormalize_eps": 1e-20,
        "routed_scaling_factor": config.require("routed_scaling_factor"),
        **fields,
    }


def _mistral4(config: Config) -> Fields:
    """Mistral 4: the same in the logits' dtype, divided by the sum if norm_topk_prob."""
    fields = {"projection_dtype": "input", "score_dtype": "input", "weights_rounding": "input"}
    return _mistral_large4(config, renormalize=bool(config.require("norm_topk_prob")), **fields)


def _ernie(config: Config) -> Fields:
    """Ernie 4.5: softmax in float32, top-k of score plus bias, divided by the sum or a least number."""
    return {
        **_sizes(config),
        "projection_dtype": "float32",
        "e_score_correction_bias": True,
        "renormalize": True,
        "renormalize_min": config.require("moe_norm_min"),
    }


def _longcat(config: Config) -> Fields:
    """LongCat Flash: softmax in float32, top-k of score plus bias; the last experts do nothing."""
    fields, num_null_experts = _sizes(config), config.get("zero_expert_num") or 0
    return {
        "num_experts": fields["num_experts"] + num_null_experts,
        "num_null_experts": num_null_experts,
        "top_k": fields["top_k"],
        "projection_dtype": "float32",
        "e_score_correction_bias": True,
        "sorted": False,
        "routed_scaling_factor": config.require("routed_scaling_factor"),
    }


def _deepseek_v4(config: Config) -> Fields:
    """DeepSeek V4: sqrt(softplus) in the logits' dtype plus bias; in the first layers a table chooses by token id."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        num_hashed = config.require("num_hash_layers")
        kinds = ["hash_moe"] * num_hashed + ["moe"] * (config.require("num_hidden_layers") - num_hashed)
    is_hashed = config.of_layer("mlp_layer_types", kinds) == "hash_moe"
    return _sigmoid(
        config,
        1e-20,
        "routed_scaling_factor",
        scoring_func=config.require("scoring_func"),
        score_dtype="input",
        e_score_correction_bias=not is_hashed,
        hash_routing=is_hashed,
        sorted=False,
        weights_rounding="input",
    )


# A factor on the output of experts is none of the router's (beam, laguna, minimax_m3_vl_text, step3p5). Rounded to 16
# bits between two steps, which no spec says, are the divisor of cohere2_moe (with sigmoid), dbrx, lfm2_moe, mistral4
# and deepseek_v4, and what ranks groups in mistral4 and experts in deepseek_v4: there, near ties may fall otherwise.
_FAMILIES: dict[str, Callable[[Config], Fields]] = {
    "gemma4_text": _gemma4,
    "diffusion_gemma_text": _gemma4,
    **dict.fromkeys(("mixtral", "minimax"), _mixtral),
    "hunyuan_v1_moe": functools.partial(_mixtral, projection_dtype="float32"),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_omni_moe_talker_text", "olmoe", "flex_olmo"), _qwen),
    # True is the default of their configs:
    **dict.fromkeys(
        ("qwen3_next", "qwen3_omni_moe_text", "qwen4_exp_text", "mellum"), functools.partial(_qwen, norm_topk_prob=True)
    ),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_vl_moe_text"), functools.partial(_softmax, renormalize=True)),
    "jamba": _softmax,
    "dbrx": _dbrx,
    "gpt_oss": functools.partial(_top_k_softmax, router_bias=True),
    **dict.fromkeys(
        ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "aria_text", "jetmoe"), _top_k_softmax
    ),
    "openai_privacy_filter": _privacy_filter,
    "cohere2_moe": _cohere2,
    "llama4_text": _llama4,
    "kolibri1": _kolibri,
    **dict.fromkeys(("minimax_m2", "minimax_m3_vl_text", "step3p5"), functools.partial(_sigmoid, sorted=False)),
    "laguna": _laguna,
    "afmoe": functools.partial(_sigmoid, eps=1e-20, factor="route_scale"),
    "hy_v3": _hy_v3,
    "dots3_note_vision_encoder": _dots3_vision,
    "inkling2_text": functools.partial(
        _sigmoid, eps=1e-20, factor="route_scale", projection_dtype="float32", sorted=False
    ),
    "muse_spark_text": _muse_spark,
    "lfm2_moe": _lfm2,
    "flint": _flint,
    **dict.fromkeys(
        (
            "axk1", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note_text", "exaone_moe",
            "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "glm5_next_text", "glm_moe_dsa", "hy_v4", "kimi_linear",
            "mimo_v2_flash", "nemotron_h", "solar_open",
        ),
        _deepseek_v3,
    ),
    "beam": functools.partial(_deepseek_v3, routed_scaling_factor=1.0, sorted=True),
    "axk2": _axk2,
    **dict.fromkeys(("deepseek_v2", "deepseek_ocr2_text", "unlimited_ocr_text"), _deepseek_v2),
    "mistral4": _mistral4,
    "mistral_large4_text": _mistral_large4,
    **dict.fromkeys(("ernie4_5_moe", "ernie4_5_vl_moe_text"), _ernie),
    "longcat_flash": _longcat,
    "deepseek_v4": _deepseek_v4,
}  # fmt: skip

KNOWN_MODEL_TYPES = tuple(sorted(_FAMILIES))
# Routers that no `RouterSpec` says.
_NOT_EXPRESSED = {
    "doge": "it combines the best of two sets of keys",
    "inkling_text": "its weights are normalised together with those of shared experts, and multiplied by a parameter",
    "nllb-moe": "its experts take a limited number of tokens, and tokens compete for them",
    "phimoe": "it takes each weight from a softmax over what comes near the best",
    "switch_transformers": "its experts take a limited number of tokens, and tokens compete for them",
    "zaya": "its logits depend on the router of the layer before, and its last expert stands for expert 0 of weight 0",
}


def spec_fields(config: Any, layer: int | None = None) -> Fields:
    """The fields of `RouterSpec` that a model's config stands for; see `RouterSpec.from_config`."""
    reader = Config(config, layer)
    model_type = reader.get("model_type")
    if model_type in _FAMILIES:
        return _FAMILIES[model_type](reader)
    if model_type in _NOT_EXPRESSED:
        raise ValueError(
            f"turnout.RouterSpec does not express the router of model type {model_type!r}: {_NOT_EXPRESSED[model_type]}"
        )
    text_config = reader.get("text_config")
    if text_config is not None and Config(text_config).get("model_type") in (*_FAMILIES, *_NOT_EXPRESSED):
        return spec_fields(text_config, layer)
    raise ValueError(
        f"no router is known for model type {model_type!r}; known are {', '.join(KNOWN_MODEL_TYPES)} "
        "(and models that hold one of them as text_config). Describe another router with "
        "turnout.RouterSpec(num_experts=..., top_k=..., ...)."
    )
