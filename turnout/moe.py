"""``turnout.moe``: a Mixture-of-Experts layer as its stations, one after the other, and nothing else."""

from __future__ import annotations

import torch

from turnout.experts.api import IMPLS, choose_impl, contract_of, experts
from turnout.impls import check_impl
from turnout.router import project
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
        inputs: the per-call tensors that ``router_spec`` names, and padding, if any.
        impl: the implementation of the experts, as in `turnout.experts`.
        batch_invariant: as in `turnout.experts`. (The router's projection is torch's.)

    Returns:
        [T, H] of the dtype of ``hidden_states``; rows of padding are 0.

    Raises:
        ValueError, TypeError, NotImplementedError: as the stations `turnout.route` and `turnout.experts`.
    """
    if impl == "auto":
        impl = choose_impl(hidden_states, router_spec.top_k, router_spec.num_experts, batch_invariant).impl
    else:
        check_impl(impl, IMPLS)
    routed_states = None if inputs is None else inputs.router_hidden_states
    router_logits = project(hidden_states if routed_states is None else routed_states, router, router_spec)
    contract = contract_of(impl, hidden_states.shape[0] * router_spec.top_k, router_spec.num_experts)
    routing = route(router_logits, router_spec, contract, inputs)
    return experts(hidden_states, weights, routing, experts_spec, impl=impl, batch_invariant=batch_invariant)
