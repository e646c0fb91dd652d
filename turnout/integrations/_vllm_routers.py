"""What each router class of vLLM computes, as a `turnout.RouterSpec`, and where its tensors are at each call.

Classes and custom functions are known by name, since they move between vLLM's releases, and only if they are vLLM's
own. vLLM's weights are float32, and none of its routers rounds them. Where its implementations of one router differ,
the spec says what the model means: scores in float32 (one path of grouped top-k takes them in the logits' dtype), and
the sum of the weights as divisor (some kernels add 1e-20 to it).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from turnout.spec import RouterSpec
from turnout.types import RoutingInputs

ROUTERS = "vllm.model_executor.layers.fused_moe.router."
MODELS = "vllm.model_executor.models."


class NotExpressedError(Exception):
    """A router computes what no `turnout.RouterSpec` says; the message is the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routable:
    """A router as `turnout.route` runs it.

    Attributes:
        spec: what it computes.
        scale_owner: the object whose ``per_expert_scale`` it multiplies by; read at each call, never kept.
        bias_owner: likewise for ``e_score_correction_bias``.
        table_owner: likewise for ``_hash_indices_table``.
        skips_padding: rows that vLLM marks as padding get id -1 and weight 0.
        note: where the model means other than what vLLM's router computes on this device.
    """

    spec: RouterSpec
    scale_owner: Any = None
    bias_owner: Any = None
    table_owner: Any = None
    skips_padding: bool = False
    note: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether logits and ``per_expert_scale`` are all that it reads, where there is no padding."""
        return self.bias_owner is None and self.table_owner is None

    def per_expert_scale(self) -> torch.Tensor | None:
        """That parameter as it is now."""
        return None if self.scale_owner is None else self.scale_owner.per_expert_scale

    def padding(self, num_tokens: int) -> torch.Tensor | None:
        """The rows that it skips in the forward pass that runs."""
        return padding_of(num_tokens) if self.skips_padding else None

    def inputs(self, input_ids: torch.Tensor | None, is_padding: torch.Tensor | None) -> RoutingInputs:
        """The tensors of one call."""
        bias = None if self.bias_owner is None else self.bias_owner.e_score_correction_bias
        hashed = self.table_owner is not None
        return RoutingInputs(
            per_expert_scale=self.per_expert_scale(),
            e_score_correction_bias=bias,
            input_ids=input_ids if hashed else None,
            tid2eid=self.table_owner._hash_indices_table if hashed else None,
            is_padding=is_padding,
        )


def routable(router: Any, num_columns: int) -> Routable:
    """A router of vLLM, for logits [T, num_columns].

    Raises:
        NotExpressedError: turnout does not know, or cannot say, what it computes.
    """
    kind = type(router)
    known = _ROUTERS.get(kind.__name__) if kind.__module__.startswith(ROUTERS) else None
    if known is None:
        raise NotExpressedError(f"turnout does not know the router class {kind.__module__}.{kind.__qualname__}")
    if kind._compute_routing.__module__ != kind.__module__:
        raise NotExpressedError(f"{kind.__name__}._compute_routing has been replaced by another tool")
    if getattr(router, "bias_vl", None) is not None:
        raise NotExpressedError("image tokens select their experts with a bias of their own (bias_vl)")
    if getattr(router, "num_fused_shared_experts", 0):
        raise NotExpressedError("fused shared experts get slots of their own (num_fused_shared_experts)")
    try:
        return known(router, num_columns)
    except (TypeError, ValueError) as error:  # of RouterSpec: a value that no router should have
        raise NotExpressedError(str(error)) from error


def custom_function(router: Any) -> Callable[..., Any] | None:
    """The custom routing function that a router calls, if it calls one."""
    is_grouped = getattr(router, "use_grouped_topk", False) or getattr(router, "scoring_func", "") == "sqrtsoftplus"
    return None if is_grouped else getattr(router, "custom_routing_function", None)


def _fused_topk(router: Any, num_columns: int) -> Routable:
    return Routable(spec=_plain_spec(router, num_columns, router.scoring_func), skips_padding=_skips_padding())


def _fused_topk_bias(router: Any, num_columns: int) -> Routable:
    hashed = router._hash_indices_table is not None
    if hashed and router.scoring_func != "sqrtsoftplus":
        raise NotExpressedError(f"a table of experts beside scoring_func={router.scoring_func!r}")
    biased = not hashed and router.e_score_correction_bias is not None
    spec = _plain_spec(
        router, num_columns, router.scoring_func,
        routed_scaling_factor=router.routed_scaling_factor, e_score_correction_bias=biased, hash_routing=hashed,
    )  # fmt: skip
    return Routable(
        spec=spec,
        bias_owner=router if biased else None,
        table_owner=router if hashed else None,
        skips_padding=_skips_padding(),
    )


def _grouped_topk(router: Any, num_columns: int) -> Routable:
    """With groups that do not divide the experts, vLLM falls back to plain top-k, of softmax where there is no bias."""
    biased = router.e_score_correction_bias is not None
    if num_columns > router.num_expert_group and num_columns % router.num_expert_group == 0:
        return dataclasses.replace(
            _grouped(router, num_columns), skips_padding=getattr(router, "skip_padding", False)
        )  # fmt: skip
    if not biased:
        return Routable(spec=_plain_spec(router, num_columns, "softmax"), skips_padding=_skips_padding())
    spec = _plain_spec(
        router, num_columns, router.scoring_func,
        routed_scaling_factor=router.routed_scaling_factor, e_score_correction_bias=True,
    )  # fmt: skip
    return Routable(spec=spec, bias_owner=router, skips_padding=_skips_padding())


def _grouped(router: Any, num_columns: int) -> Routable:
    biased = router.e_score_correction_bias is not None
    spec = _plain_spec(
        router, num_columns, router.scoring_func,
        routed_scaling_factor=router.routed_scaling_factor, e_score_correction_bias=biased,
        num_expert_group=router.num_expert_group, topk_group=router.topk_group,
        group_score="top2_sum" if biased else "max",
    )  # fmt: skip
    return Routable(spec=spec, bias_owner=router if biased else None)


def _zero_expert(router: Any, num_columns: int) -> Routable:
    """The ids past the experts are the zero experts'; `RouteWithZeroExperts` does what else such a router does."""
    spec = _plain_spec(
        router, num_columns, router.scoring_func,
        routed_scaling_factor=router.routed_scaling_factor, e_score_correction_bias=True,
        num_null_experts=num_columns - router.num_logical_experts,
    )  # fmt: skip
    return Routable(spec=spec, bias_owner=router)


def _cpu(router: Any, num_columns: int) -> Routable:
    if router.use_grouped_topk:
        return _grouped(router, num_columns)
    if router.scoring_func == "sqrtsoftplus":
        return dataclasses.replace(_fused_topk_bias(router, num_columns), skips_padding=False)
    if router.custom_routing_function is not None:
        return _custom(router, num_columns)
    if router.e_score_correction_bias is not None:
        note = "with the selection bias, without which vLLM's router for CPUs takes softmax and refuses sigmoid"
        return dataclasses.replace(_fused_topk_bias(router, num_columns), skips_padding=False, note=note)
    return Routable(spec=_plain_spec(router, num_columns, router.scoring_func))


def _custom(router: Any, num_columns: int) -> Routable:
    name = _name_of(router.custom_routing_function)
    known = _FUNCTIONS.get(name.removeprefix(MODELS))
    if known is None:
        raise NotExpressedError(f"custom routing function {name}")
    return known(router, num_columns)


def _name_of(function: Any) -> str:
    """Where it is defined; never its repr, which may hold tensors and be another one for each layer."""
    if isinstance(function, functools.partial):
        return f"partial of {_name_of(function.func)}"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _gemma4(router: Any, num_columns: int) -> Routable:
    """A method of the router module, or (before 0.31) a closure over the layer that owns the scales."""
    function = router.custom_routing_function
    owner = getattr(function, "__self__", None)
    if owner is None:
        owner = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))["self"].cell_contents
    spec = RouterSpec(num_experts=num_columns, top_k=router.top_k, renormalize=True, per_expert_scale=True)
    return Routable(spec=spec, scale_owner=owner)


def _llama4(router: Any, num_columns: int) -> Routable:
    spec = RouterSpec(num_experts=num_columns, top_k=router.top_k, scoring_func="none", selected_score="sigmoid")
    return Routable(spec=spec)


def _cohere2(router: Any, num_columns: int) -> Routable:
    return Routable(spec=_plain_spec(router, num_columns, "sigmoid"))


def _skips_padding() -> bool:
    """Whether vLLM's kernels of fused top-k are told the padding: from 0.28 on."""
    return hasattr(importlib.import_module(ROUTERS + "fused_topk_router"), "_get_padding_mask")


def _plain_spec(router: Any, num_columns: int, scoring_func: str, **further: Any) -> RouterSpec:
    return RouterSpec(
        num_experts=num_columns, top_k=router.top_k, scoring_func=scoring_func,  # type: ignore[arg-type]
        renormalize=bool(router.renormalize), **further,
    )  # fmt: skip


_ROUTERS: dict[str, Callable[[Any, int], Routable]] = {
    "CustomRoutingRouter": _custom,
    "FusedTopKRouter": _fused_topk,
    "FusedTopKBiasRouter": _fused_topk_bias,
    "GroupedTopKRouter": _grouped_topk,
    "ZeroExpertRouter": _zero_expert,
    "CPURouter": _cpu,
}
_FUNCTIONS: dict[str, Callable[[Any, int], Routable]] = {
    "gemma4.Gemma4Router.routing_function": _gemma4,
    "gemma4.Gemma4MoE.__init__.<locals>.routing_function": _gemma4,
    "llama4.Llama4MoE.custom_routing_function": _llama4,
    "cohere2_moe.token_choice_with_bias": _cohere2,
}
KNOWN_ROUTERS = (*_ROUTERS, "RoutingSimulatorRouter")
KNOWN_FUNCTIONS = tuple(_FUNCTIONS)


@functools.cache
def _padding_environment() -> tuple[Any, Any]:
    from vllm import envs, forward_context

    return envs, forward_context


def padding_of(num_tokens: int) -> torch.Tensor | None:
    """The rows that vLLM marks as padding in the forward pass that runs, where its routers would skip them."""
    envs, forward_context = _padding_environment()
    if not envs.VLLM_MOE_SKIP_PADDING or not forward_context.is_forward_context_available():
        return None
    is_padding: torch.Tensor | None = forward_context.get_forward_context().is_padding
    return None if is_padding is None else is_padding[:num_tokens]
