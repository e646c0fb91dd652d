"""One MoE layer of vLLM: what turnout does in it, decided at its first forward pass, and its calls from then on.

The methods that vLLM calls are set on the router's instance, so that nothing else is changed. They also run while
Dynamo traces them (vLLM compiles its CPU layers whole); what cannot be traced, the decision, is a constant to it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from turnout.contracts import Contract
from turnout.integrations import _vllm_modes as modes
from turnout.integrations._vllm_consumers import Consumer, consumer_of
from turnout.integrations._vllm_experts import LayerExperts
from turnout.integrations._vllm_routers import NotExpressedError, Routable, custom_function, routable
from turnout.integrations._vllm_select import RouteToReplicas, Select, Simulate, Strict, choose_select
from turnout.routing.api import choose_impl

STATES = ("routed", "strict", "simulated", "kept", "routes by itself")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What was decided for a layer.

    Attributes:
        state: ``"routed"``: turnout computes; ``"strict"``: a custom function that turnout does not know computes, and
            its result gets the consumer's form; ``"simulated"``: vLLM's simulator, in the consumer's form; ``"kept"``:
            vLLM's own router; ``"routes by itself"``: the experts route, and no router is called.
        reason: why.
        impl: of `turnout.route`; "" where it does not run.
        asked: the dtype that vLLM asked for.
        kernel: vLLM's kernel that the consumer was found in.
        consumer: who reads the result; None where no router is called.
        select: computes weights and logical ids; None where vLLM's own method runs.
        select_physical: computes physical ids and counts load, for EPLB; None where vLLM does that after `select`.
    """

    state: str
    reason: str
    impl: str = ""
    asked: torch.dtype | None = None
    kernel: Any = None
    consumer: Consumer | None = None
    select: Select | None = None
    select_physical: Select | None = None


class RoutedLayer:
    """The binding of turnout to one runner of vLLM."""

    def __init__(self, runner: Any, mode: str, decided: Callable[[], None]) -> None:
        self.name: str = runner.layer_name
        self.router = runner.router
        self.experts = runner.routed_experts
        self.mode = mode
        self.plan: Any = None  # a Plan, once one is made
        self.reported = False
        self._decided = decided
        self._stock_select: Callable[..., tuple[torch.Tensor, torch.Tensor]] = self.router._select_experts
        self._stock_monolithic = self.experts.forward_monolithic
        self.few_tokens = LayerExperts(runner, mode)

    def install(self) -> None:
        """Let vLLM call this layer's methods in place of its own."""
        for decision in (RoutedLayer.decide, RoutedLayer.decide_monolithic):
            torch.compiler.assume_constant_result(decision)  # not as a decorator: it imports all of Dynamo, and triton
        self.router._select_experts = self.select_experts
        self.experts.forward_monolithic = self.forward_monolithic
        self.few_tokens.install()

    def remove(self) -> None:
        """Let vLLM call its own again."""
        self.few_tokens.remove()
        for owner, name in ((self.router, "_select_experts"), (self.experts, "forward_monolithic")):
            owner.__dict__.pop(name, None)

    def select_experts(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        topk_indices_dtype: torch.dtype | None = None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of ``BaseRouter._select_experts``: weights and ids, in the form that the consumer reads."""
        if (modes.forced or self.mode) == "off":
            return self._stock_select(hidden_states, router_logits, topk_indices_dtype, input_ids=input_ids)
        self.decide(router_logits.shape[-1], topk_indices_dtype)
        plan = self.plan
        if plan.select is None:
            return self._stock_select(hidden_states, router_logits, topk_indices_dtype, input_ids=input_ids)
        if self.router.eplb_state is not None:
            return self._select_replicas(plan, hidden_states, router_logits, input_ids)
        topk_weights, topk_ids = plan.select(hidden_states, router_logits, input_ids)
        if self.router.capture_fn is not None:
            self.router.capture_fn(topk_ids)
        return topk_weights, topk_ids

    def _select_replicas(
        self, plan: Plan, hidden_states: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """With EPLB: ids of physical experts. A capture wants the logical ones first, so vLLM's map then runs after."""
        router = self.router
        router._validate_eplb_state()
        if plan.select_physical is not None and router.capture_fn is None:
            return plan.select_physical(hidden_states, router_logits, input_ids)
        topk_weights, topk_ids = plan.select(hidden_states, router_logits, input_ids)  # type: ignore[misc]
        if router.capture_fn is not None:
            router.capture_fn(topk_ids)
        return topk_weights, router._apply_eplb_mapping(topk_ids)

    def forward_monolithic(self, *args: Any, **kwargs: Any) -> Any:
        """In place of ``RoutedExperts.forward_monolithic``, of experts that route by themselves."""
        if self.plan is None and (modes.forced or self.mode) != "off":
            self.decide_monolithic()
        return self._stock_monolithic(*args, **kwargs)

    def decide(self, num_columns: int, asked: torch.dtype | None) -> None:
        """Decide what runs, once for a kernel of the experts; before the first forward pass there is none."""
        plan, kernel = self.plan, self.experts.quant_method.moe_kernel
        if plan is not None and plan.asked is asked and plan.kernel is kernel:
            return
        plan = self._plan(num_columns, consumer_of(kernel, asked))
        self.plan = dataclasses.replace(plan, asked=asked, kernel=kernel)
        self._decided()

    def _plan(self, num_columns: int, consumer: Consumer) -> Plan:
        router, contract = self.router, consumer.contract
        if type(router).__name__ == "RoutingSimulatorRouter":
            reason = f"nothing to compute from logits; {consumer.reason}"
            simulate = Simulate(router, contract.ids_dtype)
            return Plan(state="simulated", reason=reason, consumer=consumer, select=simulate)
        weight = next(self.experts.parameters())
        try:
            known = routable(router, num_columns)
            if weight.is_cpu:  # vLLM's routers for CPUs know no padding, and its experts no such ids
                known = dataclasses.replace(known, skips_padding=False)
            select = choose_select(router, known, contract, weight.device)
        except (NotExpressedError, NotImplementedError, ValueError) as error:
            return self._unroutable(consumer, str(error), weight)
        choice = choose_impl(weight, num_columns)
        return Plan(
            state="routed", reason="; ".join(filter(None, (consumer.reason, choice.reason, known.note))),
            impl=choice.impl, consumer=consumer, select=select,
            select_physical=None if weight.is_cpu else _physical(router, known, contract),
        )  # fmt: skip

    def _unroutable(self, consumer: Consumer, hindrance: str, weight: torch.Tensor) -> Plan:
        function = custom_function(self.router)
        if function is None:
            return Plan(state="kept", reason=hindrance, consumer=consumer)
        select = Strict(self.router, consumer.contract, contiguous=weight.is_cpu)
        return Plan(state="strict", reason=f"{hindrance}; {consumer.reason}", consumer=consumer, select=select)

    def decide_monolithic(self) -> None:
        """Experts of vLLM 0.28 and 0.29 for CPUs route in a method of their own, which can be set; others inside."""
        kernel = self.experts.quant_method.moe_kernel
        experts: Any = self.experts.quant_method if kernel is None else kernel.fused_experts
        select = getattr(experts, "_select_experts", None)
        if select is None or list(inspect.signature(select).parameters)[:2] != ["hidden_states", "router_logits"]:
            reason = f"{type(experts).__name__} takes logits and calls no router"
            self.plan = Plan(state="routes by itself", reason=reason, kernel=kernel)
            self._decided()
            return
        experts._select_experts = self._select_in_experts(select)

    def _select_in_experts(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def select_experts(
            hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if (modes.forced or self.mode) == "off":
                return stock(hidden_states, router_logits, *args, **kwargs)  # type: ignore[no-any-return]
            self.decide(router_logits.shape[-1], None)
            select: Select | None = self.plan.select
            if select is None:
                return stock(hidden_states, router_logits, *args, **kwargs)  # type: ignore[no-any-return]
            return select(hidden_states, router_logits, None)

        return select_experts


def _physical(router: Any, known: Routable, contract: Contract) -> Select | None:
    if router.eplb_state is None or known.spec.num_null_experts:
        return None
    return RouteToReplicas(router, known, dataclasses.replace(contract, id_space="physical"))
