"""What a model's router and its experts compute, as data."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing
from typing import Any, Literal

from turnout.experts_families import experts_spec_fields
from turnout.families import spec_fields

FLOAT32_MAX = 3.4028234663852886e38


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """A router of a Mixture-of-Experts model, from hidden states to ids and weights.

    The fields follow the computation: projection, score, selection, weights. They express every router
    family in use; `turnout.route` says by name which values it does not run yet.

    Attributes:
        num_experts: E, the columns of ``router_logits`` that can be chosen, null experts included.
        top_k: K, the experts of each token.

        input_norm: ``"rms_scale"``: RMSNorm without weight, x scale [H], x H^-0.5, each rounded to the input's
            dtype, before the projection; ``"none"``: nothing.
        input_norm_eps: epsilon of that norm.
        projection_dtype: ``"input"``: a GEMM in the input's dtype; ``"float32"``: input and weight widened.
        router_bias: the projection adds a bias [E].

        logit_scale: factor on the logits.
        logit_softcap: c in ``c * tanh(logits / c)``; None: no cap.
        scoring_func: the score of each expert: ``"softmax"`` over all E, ``"sigmoid"``, ``"sqrtsoftplus"``, or
            ``"none"``: the logit itself.
        score_dtype: ``"float32"``, or ``"input"``: the dtype of the logits.

        e_score_correction_bias: selection ranks score + bias [E]; weights use the score alone.
        num_expert_group: groups of equal size; 1: none.
        topk_group: groups kept by the selection.
        group_score: a group's score: its ``"max"``, or the sum of its two best, ``"top2_sum"``.
        group_fill: the score of experts outside the kept groups, ``"-inf"`` or ``"zero"``.
        hash_routing: ids come from a table indexed by token id, not from a selection.
        sorted: ids are in descending ranked value; False: the order is not part of the answer.

        selected_score: function applied to the K selected values: ``"none"``, ``"softmax"`` or ``"sigmoid"``.
        renormalize: divide the K weights by their norm.
        renormalize_order: p of that norm (1: the sum).
        renormalize_eps: added to it.
        renormalize_min: lower bound of it.
        routed_scaling_factor: factor on the weights.
        per_expert_scale: weights are multiplied by a parameter [E] at the chosen expert.
        divide_by_top_k: weights are divided by K at the end.
        weights_rounding: ``"none"``, or ``"input"``: the model rounds the weights to the dtype of its logits.
        apply_router_weight_on: where the weight enters: the experts' ``"output"`` or ``"input"``.

        num_null_experts: the last ids of E that do nothing (zero or identity experts).
        num_shared_columns: further columns of ``router_logits`` for always-on shared experts, normalised
            together with the chosen ones.

        key: the spec as JSON: what operators carry, and what `from_key` reads; not an argument.

    Example:
        >>> RouterSpec(num_experts=128, top_k=8, scoring_func="softmax", renormalize=True)
        RouterSpec(num_experts=128, top_k=8, renormalize=True)
    """

    num_experts: int
    top_k: int

    input_norm: Literal["none", "rms_scale"] = "none"
    input_norm_eps: float = 1e-6
    projection_dtype: Literal["input", "float32"] = "input"
    router_bias: bool = False

    logit_scale: float = 1.0
    logit_softcap: float | None = None
    scoring_func: Literal["softmax", "sigmoid", "sqrtsoftplus", "none"] = "softmax"
    score_dtype: Literal["float32", "input"] = "float32"

    e_score_correction_bias: bool = False
    num_expert_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    group_fill: Literal["-inf", "zero"] = "-inf"
    hash_routing: bool = False
    sorted: bool = True

    selected_score: Literal["none", "softmax", "sigmoid"] = "none"
    renormalize: bool = False
    renormalize_order: float = 1.0
    renormalize_eps: float = 0.0
    renormalize_min: float = 0.0
    routed_scaling_factor: float = 1.0
    per_expert_scale: bool = False
    divide_by_top_k: bool = False
    weights_rounding: Literal["none", "input"] = "none"
    apply_router_weight_on: Literal["output", "input"] = "output"

    num_null_experts: int = 0
    num_shared_columns: int = 0

    key: str = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_types(self)
        object.__setattr__(self, "key", json.dumps(_stated(self)))  # now: a compiler cannot trace it later
        self._check_counts()
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap must be above 0, or None for no cap; got {self.logit_softcap}")
        if self.hash_routing and self.e_score_correction_bias:
            raise ValueError("hash_routing contradicts e_score_correction_bias: a table leaves nothing to rank")
        if self.scoring_func == "softmax" and self.selected_score != "none":
            raise ValueError(
                f"selected_score={self.selected_score!r} contradicts scoring_func='softmax': a score is "
                "taken before or after the selection, not both. Use scoring_func='none'."
            )
        if self.renormalize and self.scoring_func == self.selected_score == "none":
            raise ValueError(
                "renormalize=True contradicts scoring_func='none' with selected_score='none': the sum of logits may be "
                "0 or negative. Give a selected_score, for instance 'softmax'."
            )

    def _check_counts(self) -> None:
        if abs(self.routed_scaling_factor) > FLOAT32_MAX:
            raise ValueError(f"routed_scaling_factor must be a float32 number, got {self.routed_scaling_factor}")
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {self.num_experts}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k must lie in [1, num_experts={self.num_experts}], got {self.top_k}: a token cannot "
                "choose more experts than there are"
            )
        if self.num_expert_group < 1 or self.num_experts % self.num_expert_group:
            raise ValueError(
                f"num_expert_group must divide num_experts={self.num_experts}, got {self.num_expert_group}"
            )
        if not 1 <= self.topk_group <= self.num_expert_group:
            raise ValueError(
                f"topk_group must lie in [1, num_expert_group={self.num_expert_group}], got {self.topk_group}"
            )
        if self.topk_group * (self.num_experts // self.num_expert_group) < self.top_k:
            raise ValueError(
                f"top_k={self.top_k} experts do not fit topk_group={self.topk_group} groups of "
                f"{self.num_experts // self.num_expert_group}; keep more groups, or choose fewer experts"
            )
        if self.logit_scale <= 0:
            raise ValueError(f"logit_scale must be above 0, got {self.logit_scale}")
        if not 0 <= self.num_null_experts < self.num_experts:
            raise ValueError(
                f"num_null_experts must lie in [0, num_experts={self.num_experts}), got {self.num_null_experts}"
            )
        if self.num_shared_columns < 0:
            raise ValueError(f"num_shared_columns must not be negative, got {self.num_shared_columns}")

    @functools.cached_property
    def ranks_scores(self) -> bool:
        """Whether the selection ranks scores. Otherwise it ranks logits, which is the same but for underflow."""
        return self.e_score_correction_bias or (self.num_expert_group > 1 and self.group_score == "top2_sum")

    @functools.cached_property
    def weighs_by_shares(self) -> bool:
        """Whether the weights are shares of a softmax mass, taken without the probabilities of all experts."""
        if self.selected_score != "none":
            return self.selected_score == "softmax"
        rounds_sum = self.renormalize and (self.renormalize_eps != 0 or self.renormalize_min != 0)
        return self.scoring_func == "softmax" and not (self.ranks_scores or rounds_sum or self.score_dtype == "input")

    @functools.cached_property
    def shares_among_selected(self) -> bool:
        """Whether those shares are of the mass of the selected experts; otherwise of all."""
        return self.renormalize or self.selected_score == "softmax"

    @functools.cached_property
    def fills_with_zero(self) -> bool:
        """Whether experts outside of the kept groups rank as 0. Where logits stand for scores, that is -inf."""
        return self.group_fill == "zero" and (self.ranks_scores or self.scoring_func == "none")

    @classmethod
    def from_config(cls, config: Any, *, layer: int | None = None) -> RouterSpec:
        """The router of a Hugging Face model.

        It is that of the router's class in transformers: a factor on the output of experts is not in it.

        Args:
            config: a ``transformers`` config, or the dict of a ``config.json``; nested configs (Gemma 4's
                ``text_config``) are looked into.
            layer: which layer's, for models whose layers have different routers (DeepSeek V4: the first take experts
                from a table); counted from 0.

        Raises:
            ValueError: the model type is not known (the message lists those that are), its router is none that a spec
                expresses, the model has no Mixture-of-Experts layer, or its layers differ and ``layer`` is missing.
        """
        return cls(**spec_fields(config, layer))

    # By the key, which says all: comparing and hashing field by field costs microseconds at every call.
    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, RouterSpec) and self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    @classmethod
    def from_key(cls, key: str) -> RouterSpec:
        """The spec that wrote this `key`."""
        return cls(**json.loads(key))

    def __repr__(self) -> str:
        return f"RouterSpec({', '.join(f'{k}={v!r}' for k, v in _stated(self).items())})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """The experts of a Mixture-of-Experts layer: what they compute, and how their weights lie in memory.

    ``gate, up = gate_up_proj(x); down_proj(activation(gate) * (up + up_offset))``, in each expert that a token chose.

    Attributes:
        activation: ``"silu"``: ``gate * sigmoid(activation_alpha * gate)``; ``"gelu"``: with the error function;
            ``"gelu_tanh"``: its approximation by tanh.
        activation_alpha: factor inside of silu's sigmoid (gpt-oss: 1.702).
        activation_limit: gate is clamped to at most this, up to both sides (gpt-oss: 7.0); None: not at all.
        up_offset: added to up, after the clamp (gpt-oss: 1.0).

        transposed: weights are [E, H, 2I] and [E, I, H] (gpt-oss) in place of [E, 2I, H] and [E, H, I].
        interleaved: gate and up alternate along 2I (gpt-oss), in place of all gate before all up.
        bias: both projections add a bias.

        quantization: ``"none"``; ``"w4a16"``: int4 weights in groups, eight to an int32; ``"w8a8_int8"`` and
            ``"w8a8_fp8"``: 8-bit weights with a scale per row, activations quantised per token; ``"w4a8_int8"``: int4
            weights in groups, activations quantised per token to int8.
        group_size: input columns that share a scale, for the int4 schemes; None otherwise.

        key: the spec as JSON: what operators carry, and what `from_key` reads; not an argument.

    Example:
        >>> ExpertsSpec(activation="gelu_tanh")
        ExpertsSpec(activation='gelu_tanh')
    """

    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    activation_alpha: float = 1.0
    activation_limit: float | None = None
    up_offset: float = 0.0

    transposed: bool = False
    interleaved: bool = False
    bias: bool = False

    quantization: Literal["none", "w4a16", "w4a8_int8", "w8a8_int8", "w8a8_fp8"] = "none"
    group_size: int | None = None

    key: str = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_types(self)
        object.__setattr__(self, "key", json.dumps(_stated(self)))  # now: a compiler cannot trace it later
        if self.activation_alpha != 1.0 and self.activation != "silu":
            raise ValueError(
                f"activation_alpha={self.activation_alpha} contradicts activation={self.activation!r}: it is silu's"
            )
        if self.activation_limit is not None and self.activation_limit <= 0:
            raise ValueError(f"activation_limit must be above 0, or None for no clamp; got {self.activation_limit}")
        if (self.group_size is not None) != self.quantization.startswith("w4"):
            raise ValueError(
                f"group_size={self.group_size} contradicts quantization={self.quantization!r}: the int4 schemes have "
                "one, the others do not"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    @classmethod
    def from_config(cls, config: Any) -> ExpertsSpec:
        """The experts of a Hugging Face model, in the layout that its checkpoint is loaded with, not quantised.

        Args:
            config: a ``transformers`` config, or the dict of a ``config.json``; nested configs (Gemma 4's
                ``text_config``) are looked into.

        Raises:
            ValueError: the model type is not known (the message lists those that are), or its activation is not.
        """
        return cls(**experts_spec_fields(config))

    # By the key, as in `RouterSpec`.
    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ExpertsSpec) and self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    @classmethod
    def from_key(cls, key: str) -> ExpertsSpec:
        """The spec that wrote this `key`."""
        return cls(**json.loads(key))

    def __repr__(self) -> str:
        return f"ExpertsSpec({', '.join(f'{k}={v!r}' for k, v in _stated(self).items())})"


def _stated(spec: RouterSpec | ExpertsSpec) -> dict[str, Any]:
    """The fields that are not at their default."""
    values = {
        field.name: (getattr(spec, field.name), field.default) for field in dataclasses.fields(spec) if field.init
    }
    return {name: value for name, (value, default) in values.items() if value != default}


def _check_types(spec: RouterSpec | ExpertsSpec) -> None:
    hints = typing.get_type_hints(type(spec))
    for name in (field.name for field in dataclasses.fields(spec) if field.init):
        hint, value = hints[name], getattr(spec, name)
        if typing.get_origin(hint) is Literal:
            if value not in typing.get_args(hint):
                raise ValueError(f"{name} must be one of {typing.get_args(hint)}, got {value!r}")
        elif hint is bool or hint is int:
            if type(value) is not hint:
                raise TypeError(f"{name} must be {_article(hint)}, got {value!r}")
        elif hint == int | None:
            if value is not None and type(value) is not int:
                raise TypeError(f"{name} must be an int or None, got {value!r}")
        elif not (value is None and type(None) in typing.get_args(hint)):
            if not _is_finite_number(value):
                raise TypeError(f"{name} must be a finite number, got {value!r}")
            object.__setattr__(spec, name, float(value))  # 2 and 2.0 are one spec, with one key


def _article(kind: type) -> str:
    return "an int" if kind is int else "True or False"


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
