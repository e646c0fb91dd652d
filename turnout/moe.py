"""``turnout.moe``: a Mixture-of-Experts layer as its stations, one after the other, and nothing else."""

from __future__ import annotations

import torch

from turnout.experts.api import IMPLS, choose_impl, contract_of, experts
from turnout.impls import check_impl, check_kind
from turnout.router.api import project
from turnout.routing.api import route
from turnout.spec import ExpertsSpec, RouterSpec
from turnout.types import ExpertsWeights, RouterWeights, RoutingInputs


def moe(
    hidden_states: torch.Tensor,
    router: RouterWeights,
    weights: ExpertsWeights,
    router_spec: RouterSpec,
    experts_spec: ExpertsSpec,
    inputs: RoutingInputs | None = None,
    *,
    impl: str = "auto",
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Route each token to K experts, run them, and sum their outputs by weight.

    The implementation of the experts is chosen first; the routing launch then writes the form that it reads.

    Args:
        hidden_states: [T, H] float32, bfloat16 or float16; what the experts read, and the router, too, unless
            ``inputs.router_hidden_states`` says otherwise.
        router: the router's parameters.
        weights: the experts' parameters.
        router_spec: what the router computes.
        experts_spec: what the experts compute.
        inputs: the per-call tensors that ``router_spec`` names, and padding, if any. With an ``expert_map`` the weights
            hold the experts of one rank, and the result is that rank's share of the sum.
        impl: the implementation of the experts, as in `turnout.experts`.
        batch_invariant: as in `turnout.experts`. (The router's projection never is: a GEMM of torch's, or our launch.)

    Returns:
        [T, H] of the dtype of ``hidden_states``; rows of padding are 0.

    Raises:
        ValueError, TypeError, NotImplementedError: as the stations `turnout.route` and `turnout.experts`.
    """
    check_kind("hidden_states", hidden_states, torch.Tensor)
    check_kind("router_spec", router_spec, RouterSpec)
    check_kind("weights", weights, ExpertsWeights)
    if router_spec.apply_router_weight_on == "input":
        raise NotImplementedError("moe does not weigh the input of experts yet (RouterSpec.apply_router_weight_on)")
    num_local_experts = _num_local_experts(weights, router_spec, inputs)
    if impl == "auto":
        impl = choose_impl(hidden_states, router_spec.top_k, router_spec.num_experts, batch_invariant).impl
    else:
        check_impl(impl, IMPLS)
    routed_states = None if inputs is None else inputs.router_hidden_states
    router_logits = project(hidden_states if routed_states is None else routed_states, router, router_spec)
    num_slots = hidden_states.shape[0] * router_spec.top_k
    contract = contract_of(impl, num_slots, router_spec.num_experts, num_local_experts)
    routing = route(router_logits, router_spec, contract, inputs)
    return experts(hidden_states, weights, routing, experts_spec, impl=impl, batch_invariant=batch_invariant)


def _num_local_experts(weights: ExpertsWeights, spec: RouterSpec, inputs: RoutingInputs | None) -> int | None:
    """How many experts the weights hold, where a map says which of all they are; else they must be all."""
    num_weights = len(weights.down_proj)
    if inputs is not None and inputs.expert_map is not None:
        return num_weights
    if num_weights != spec.num_experts:
        raise ValueError(
            f"the router chooses among {spec.num_experts} experts, the weights hold {num_weights}; give the weights of "
            "all, or RoutingInputs.expert_map, which says where each expert of the router lies among these"
        )
    return None
