"""The experts of a layer of vLLM, run by turnout where tokens are few: mode ``layer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from turnout.experts.api import experts
from turnout.experts.tuning import are_few
from turnout.integrations import _vllm_modes as modes
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing

# By the values of vLLM's MoEActivation; its weights are [gate; up], as ExpertsSpec has them without more.
_SPECS = {
    "silu": ExpertsSpec(activation="silu"),
    "gelu": ExpertsSpec(activation="gelu"),
    "gelu_tanh": ExpertsSpec(activation="gelu_tanh"),
}


class LayerExperts:
    """In place of ``RoutedExperts.forward_modular`` of one layer.

    A CUDA graph keeps what ran when it was captured, so that each captured batch size has its own choice.
    """

    def __init__(self, runner: Any, mode: str) -> None:
        self._runner, self._experts, self._mode = runner, runner.routed_experts, mode
        self._stock: Callable[..., Any] = self._experts.forward_modular
        # Why vLLM's own run for any number of tokens.
        self.hindrance: str | None = "turnout's run on a CUDA device, and no token has come on one"
        self._kernel: Any = None  # vLLM's kernel for which that was asked
        self._spec = _SPECS["silu"]

    def install(self) -> None:
        """Let vLLM call this."""
        self._experts.forward_modular = self.forward

    def remove(self) -> None:
        """Let vLLM call its own again."""
        self._experts.__dict__.pop("forward_modular", None)

    def forward(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> Any:
        """The experts' output, [T, H]."""
        if x.is_cuda and (modes.forced or self._mode) == "layer" and self._runs(x, topk_ids):
            weights = ExpertsWeights(self._experts.w13_weight, self._experts.w2_weight)
            return experts(x, weights, Routing(topk_weights, topk_ids), self._spec, impl="triton")
        return self._stock(
            x=x, topk_weights=topk_weights, topk_ids=topk_ids, shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )  # fmt: skip

    def _runs(self, x: torch.Tensor, topk_ids: torch.Tensor) -> bool:
        kernel = self._experts.quant_method.moe_kernel
        if kernel is not self._kernel:
            self.hindrance, self._kernel = self._find_hindrance(x), kernel
            self._spec = _SPECS.get(self._experts.activation.value, self._spec)
        return self.hindrance is None and are_few(x.shape[0], topk_ids.shape[1], self._experts.global_num_experts)

    def _find_hindrance(self, x: torch.Tensor) -> str | None:
        """Why turnout's experts do not compute the same as vLLM's here; None: they do."""
        layer, method = self._experts, self._experts.quant_method
        backend = getattr(getattr(method, "unquantized_backend", None), "name", None)
        dispatcher = type(getattr(method.moe_kernel, "prepare_finalize", None)).__name__
        if backend != "TRITON":  # other backends reorder the weights, quantised ones have none
            return f"{type(method).__name__} with backend {backend}: not the plain weights of vLLM's Triton experts"
        if dispatcher != "MoEPrepareAndFinalizeNoDPEPModular":
            return f"{dispatcher} moves tokens between ranks"
        if layer.activation.value not in _SPECS:
            return f"activation {layer.activation.value} is none of {', '.join(_SPECS)}"
        if layer.expert_map is not None or self._runner.router.eplb_state is not None:
            return "the experts are spread over ranks"
        if getattr(self._runner, "_shared_experts", None) is not None:
            return "shared experts run beside them"
        if layer.apply_router_weight_on_input or getattr(method.moe, "has_bias", False):
            return "weights on the input, or biases"
        if layer.w13_weight.dtype != x.dtype:
            return f"weights of {layer.w13_weight.dtype}, tokens of {x.dtype}"
        return None
