"""turnout's experts as an experts implementation of transformers, named ``"turnout"``.

Every class that transformers decorates with ``use_experts_implementation`` can run it. What such a class computes is
read from its flags, its activation and its ``_apply_gate``, by their classes and never by the names in a config: that
of Gemma 4 calls its activation ``hidden_activation``, and whoever reads ``hidden_act`` runs another model. Sources:
the experts classes and ``integrations/moe.py`` of transformers 5.17 and 5.23.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel, activations
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from turnout.experts.api import experts
from turnout.integrations._transformers_layers import uses_experts_interface
from turnout.integrations.compressed_tensors import QuantizedExperts
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing

NAME = "turnout"
_INSTEAD = "run them with another one, for instance model.set_experts_implementation('grouped_mm')"

# By the class of act_fn, or act_fn itself where it is a function; those of "gelu_tanh" write one formula differently.
_ACTIVATIONS: dict[Any, dict[str, Any]] = {
    activations.SiLUActivation: {"activation": "silu"},
    nn.SiLU: {"activation": "silu"},
    nn.functional.silu: {"activation": "silu"},
    activations.QuickGELUActivation: {"activation": "silu", "activation_alpha": 1.702},
    activations.GELUActivation: {"activation": "gelu"},
    activations.GELUTanh: {"activation": "gelu_tanh"},
    activations.NewGELUActivation: {"activation": "gelu_tanh"},
    activations.FastGELUActivation: {"activation": "gelu_tanh"},
    activations.AccurateGELUActivation: {"activation": "gelu_tanh"},
}


class _Gate(NamedTuple):
    """What an ``_apply_gate`` computes beyond ``act_fn(gate) * up``; attributes are named as the experts have them."""

    is_silu: bool = False  # whatever act_fn says
    alpha: str | None = None
    limit: str | None = None
    up_offset: float = 0.0
    is_interleaved: bool = False


_CLAMPED_SWIGLU = _Gate(is_silu=True, alpha="alpha", limit="limit", up_offset=1.0)
# By qualified name. Beam's computes in float32 and rounds once, as turnout does for all.
_GATES = {
    "_default_apply_gate": _Gate(),
    "BeamExperts._apply_gate": _Gate(),
    "DeepseekV4Experts._apply_gate": _Gate(limit="limit"),
    "Glm5NextTextExperts._apply_gate": _Gate(is_silu=True, limit="swiglu_limit"),
    "HYV4Experts._apply_gate": _Gate(is_silu=True, limit="swiglu_limit"),
    "GptOssExperts._apply_gate": _CLAMPED_SWIGLU._replace(is_interleaved=True),
    "OpenAIPrivacyFilterExperts._apply_gate": _CLAMPED_SWIGLU,
    "MiniMaxM3VLExperts._apply_gate": _CLAMPED_SWIGLU._replace(alpha="swiglu_alpha", limit="swiglu_limit"),
}
_FLAGS = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,  # not in 5.17
}
_NUMBERS = tuple(sorted({name for gate in _GATES.values() for name in (gate.alpha, gate.limit) if name}))


_KEPT = "_turnout_replaced"  # on a module: the experts implementation that its config had


def register() -> None:
    """Make ``experts_implementation="turnout"`` known to transformers, in this process."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, _refuse_fp8)


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts on hidden states [T, H] with ids and weights [T, K]; see `turnout.experts`.

    Ids are global, or those of one expert-parallel rank, where ``num_experts`` marks a slot that another rank runs.
    What the implementation of the experts needs besides is computed from the ids: transformers hands over no more.

    Raises:
        NotImplementedError: the experts compute what `turnout.ExpertsSpec` does not express.
    """
    spec = experts_spec(self)
    weights = ExpertsWeights(
        self.gate_up_proj,
        self.down_proj,
        self.gate_up_proj_bias if spec.bias else None,
        self.down_proj_bias if spec.bias else None,
    )
    return experts(hidden_states, weights, Routing(top_k_weights, top_k_index), spec)


def experts_spec(module: Any) -> ExpertsSpec:
    """What an experts module computes.

    Raises:
        NotImplementedError: `turnout.ExpertsSpec` does not express it; the message says why.
    """
    act_fn = getattr(module, "act_fn", None)
    attributes = module.__dict__  # a Module takes microseconds to say that it has no such attribute
    spec: ExpertsSpec = _spec(
        type(module),
        type(act_fn) if isinstance(act_fn, nn.Module) else act_fn,
        tuple([attributes.get(name, default) for name, default in _FLAGS.items()]),
        tuple([attributes.get(name) for name in _NUMBERS]),
    )
    return spec


@torch.compiler.assume_constant_result  # a compiler would trace the spec's JSON
def _spec(*facts: Any) -> ExpertsSpec:
    return _cached_spec(*facts)


@functools.cache
def _cached_spec(
    kind: type, activation: Any, flag_values: tuple[bool, ...], number_values: tuple[float | None, ...]
) -> ExpertsSpec:
    flags = dict(zip(_FLAGS, flag_values, strict=True))
    numbers = dict(zip(_NUMBERS, number_values, strict=True))
    gate_function = getattr(kind, "_apply_gate", None)
    gate = _GATES.get(getattr(gate_function, "__qualname__", ""))
    if not flags["has_gate"]:
        _refuse(kind, "have no gate (one projection before the activation)")
    if flags["has_post_expert_norm"]:
        _refuse(kind, "normalise the output of each expert")
    if gate is None or not gate_function.__module__.startswith("transformers."):
        _refuse(kind, "have an _apply_gate of their own")
    if gate.is_interleaved == flags["is_concatenated"]:
        _refuse(kind, f"are declared is_concatenated={flags['is_concatenated']}, which their _apply_gate contradicts")
    fields = {"activation": "silu"} if gate.is_silu else _ACTIVATIONS.get(activation)
    if fields is None:
        _refuse(kind, f"have the activation {getattr(activation, '__name__', activation)}")
    if gate.alpha:
        fields = {**fields, "activation_alpha": numbers[gate.alpha]}
    return ExpertsSpec(
        **fields,
        activation_limit=numbers[gate.limit] if gate.limit else None,
        up_offset=gate.up_offset,
        transposed=flags["is_transposed"],
        interleaved=gate.is_interleaved,
        bias=flags["has_bias"],
    )


def experts_hindrances(all_experts: list[nn.Module]) -> list[str | None]:
    """Why the experts of a model's layers are not replaced, for each; None where they can be.

    The implementation is set in configs that layers share, so one layer that cannot run with turnout holds up all.
    """
    refusals = [_refusal(experts) for experts in all_experts]
    shared = next((refusal for refusal in refusals if refusal), None)
    return [
        refusal or shared if uses_experts_interface(experts) else _no_interface(experts)
        for experts, refusal in zip(all_experts, refusals, strict=True)
    ]


def _no_interface(experts: nn.Module) -> str:
    if isinstance(experts, QuantizedExperts):
        return "turnout.load_quantized has put turnout's experts there"
    return f"{type(experts).__name__} does not use transformers' experts interface"


def _refusal(experts: nn.Module) -> str | None:
    if uses_experts_interface(experts):
        try:
            experts_spec(experts)
        except NotImplementedError as error:
            return str(error)
    return None


def is_implementation_of(experts: Any) -> bool:
    """Whether transformers runs these experts, which use its interface, with turnout."""
    return bool(experts.config._experts_implementation == NAME)


def replace_experts(model: nn.Module) -> None:
    """Let every config in a model that names an experts implementation name turnout's."""
    register()
    readers: list[Any] = [module for module in model.modules() if _names_implementation(module)]
    for module in readers:
        if module.config._experts_implementation != NAME:
            setattr(module, _KEPT, module.config._experts_implementation)
    for module in readers:
        module.config._experts_implementation_internal = NAME


def restore_experts(model: nn.Module) -> None:
    """Put back the implementations that `replace_experts` found, where they were not changed since."""
    kept: list[tuple[Any, Any]] = [(module, vars(module)[_KEPT]) for module in model.modules() if _KEPT in vars(module)]
    replaced = [(module.config, implementation) for module, implementation in kept if is_implementation_of(module)]
    for config, implementation in replaced:
        config._experts_implementation_internal = implementation
    for module, _ in kept:
        delattr(module, _KEPT)


def _names_implementation(module: nn.Module) -> bool:
    """Models count, too: generate() looks at the config of the whole when it changes the implementation."""
    return isinstance(module, PreTrainedModel) or uses_experts_interface(module)


def _refuse(kind: type, what: str) -> NoReturn:
    raise NotImplementedError(f"{kind.__name__} {what}, which turnout.ExpertsSpec does not express; {_INSTEAD}")


def _refuse_fp8(self: Any, *_: object, **__: object) -> NoReturn:
    raise NotImplementedError(
        f"{type(self).__name__} hold fine-grained FP8 weights (a scale for each block), which turnout's experts do not "
        f"read; {_INSTEAD}"
    )
