"""The ways to select experts in a layer of vLLM. Each takes what the layer has, and returns weights and ids.

Every call reads the router's tensors anew. None of them casts, but for the result of a foreign custom function that
is not in the consumer's form.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from turnout.contracts import Contract
from turnout.integrations._vllm_routers import Routable
from turnout.routing.api import prepare, route, route_prepared

# Of hidden_states [T, H], router_logits [T, E] and input_ids [T] or None.
Select = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """`turnout.route` for a router; logical ids."""

    known: Routable
    contract: Contract
    prepared: str

    def __call__(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids."""
        known = self.known
        is_padding = known.padding(router_logits.shape[0])
        if is_padding is None and known.is_plain:
            return route_prepared(router_logits, self.prepared, known.per_expert_scale())
        inputs = known.inputs(input_ids, is_padding)
        return route(router_logits, known.spec, self.contract, inputs)[:2]


@dataclasses.dataclass(frozen=True, eq=False)
class RouteToReplicas:
    """`turnout.route` with EPLB: physical ids, and the load of the experts added up, in the same launch."""

    router: Any
    known: Routable
    contract: Contract

    def __call__(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids."""
        state = self.router.eplb_state
        is_padding = self.known.padding(router_logits.shape[0])
        inputs = dataclasses.replace(
            self.known.inputs(input_ids, is_padding),
            logical_to_physical_map=state.logical_to_physical_map,
            logical_replica_count=state.logical_replica_count,
            expert_load=state.expert_load_view,
            record_load=state.should_record_tensor,
            num_counted_tokens=state.num_unpadded_tokens_tensors[_microbatch_of()()],
        )
        return route(router_logits, self.known.spec, self.contract, inputs)[:2]


@dataclasses.dataclass(frozen=True, eq=False)
class RouteWithZeroExperts:
    """A router of zero experts: their outputs are computed here, and their slots then go to expert 0 with weight 0."""

    router: Any
    route: Select

    def __call__(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids of the other experts."""
        topk_weights, topk_ids = self.route(hidden_states, router_logits, input_ids)
        router = self.router
        router._zero_expert_output = _zero_experts_compute_of(type(router).__module__)(
            expert_indices=topk_ids.clone(),  # written by that kernel
            expert_scales=topk_weights.clone(),
            num_experts=router.num_logical_experts,
            zero_expert_type=router.zero_expert_type,
            hidden_states=hidden_states,
        )
        is_zero_expert = topk_ids >= router.num_logical_experts
        return topk_weights.masked_fill_(is_zero_expert, 0.0), topk_ids.masked_fill_(is_zero_expert, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Strict:
    """A custom function that turnout does not know: its result in the consumer's form, the same storage where it is."""

    router: Any
    contract: Contract
    contiguous: bool

    def __call__(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids."""
        router = self.router
        topk_weights, topk_ids = router.custom_routing_function(
            hidden_states=hidden_states, gating_output=router_logits, topk=router.top_k, renormalize=router.renormalize
        )
        topk_weights, topk_ids = topk_weights.to(self.contract.weights_dtype), topk_ids.to(self.contract.ids_dtype)
        if self.contiguous:
            return topk_weights.contiguous(), topk_ids.contiguous()
        return topk_weights, topk_ids


@dataclasses.dataclass(frozen=True, eq=False)
class Simulate:
    """vLLM's routing simulator, told the consumer's dtype: left to itself it takes int64 where nothing is asked."""

    router: Any
    ids_dtype: torch.dtype

    def __call__(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids."""
        return self.router._compute_routing(  # type: ignore[no-any-return]
            hidden_states, router_logits, self.ids_dtype, input_ids=input_ids
        )


def choose_select(router: Any, known: Routable, contract: Contract, device: torch.device) -> Select:
    """What selects logical experts for a router that turnout knows.

    It has run once when it is returned, so that no kernel is compiled while CUDA captures a graph.

    Raises:
        NotImplementedError: spec or contract ask for something by name that `turnout.route` does not run there.
    """
    select = Route(known, contract, prepare(known.spec, contract))
    logits = torch.zeros(1, known.spec.num_experts, device=device)
    with torch.inference_mode():
        select(logits, logits, torch.zeros(1, dtype=torch.int32, device=device))
    return RouteWithZeroExperts(router, select) if known.spec.num_null_experts else select


@functools.cache
def _zero_experts_compute_of(module: str) -> Callable[..., torch.Tensor]:
    return importlib.import_module(module).zero_experts_compute_triton  # type: ignore[no-any-return]


@functools.cache
def _microbatch_of() -> Callable[[], int]:
    from vllm.v1.worker.ubatching import dbo_current_ubatch_id

    return dbo_current_ubatch_id  # type: ignore[no-any-return]
