"""The operators ``turnout::route`` and ``turnout::route_out``, as torch's dispatcher, compiler and export see them.

Spec and contract travel as one string, two lines of JSON: an exported graph holds all it needs and no handle into this
process. Which implementation runs is an argument, so that a compiled graph runs what eager code ran.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from turnout.contracts import Contract
from turnout.spec import RouterSpec

_SEPARATOR = "\n"
_INPUTS = (
    "Tensor router_logits, str declarations, str impl, "
    "Tensor? per_expert_scale, Tensor? is_padding, Tensor? num_valid_tokens"
)
torch.library.define("turnout::route", f"({_INPUTS}) -> (Tensor topk_weights, Tensor topk_ids)")
torch.library.define("turnout::route_out", f"({_INPUTS}, *, Tensor(a!) topk_weights, Tensor(b!) topk_ids) -> ()")
# Nothing here is differentiable, and callers refuse what requires grad: autograd's own fallback is time lost.
for _operator in ("route", "route_out"):
    torch.library.impl(f"turnout::{_operator}", "Autograd")(torch.library.fallthrough_kernel)
route, route_out = torch.ops.turnout.route.default, torch.ops.turnout.route_out.default

Launch = Callable[..., None]


def declarations(spec: RouterSpec, contract: Contract) -> str:
    """Spec and contract as the string that the operators take."""
    return spec.key + _SEPARATOR + contract.key


@functools.cache
def _declared(declarations: str) -> tuple[RouterSpec, Contract]:
    spec_key, contract_key = declarations.split(_SEPARATOR)
    return RouterSpec.from_key(spec_key), Contract.from_key(contract_key)


@functools.cache
def _launch_of(impl: str) -> Launch:
    """The implementation's ``launch``; kernels are imported at their first use."""
    try:
        launch: Launch = importlib.import_module(f"turnout.routing.{impl}").launch
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError("impl='triton' needs the triton package: pip install 'turnout[triton]'") from error
    return launch


@torch.library.impl("turnout::route", "CompositeExplicitAutograd")
def _route(
    router_logits: torch.Tensor,
    declarations: str,
    impl: str,
    per_expert_scale: torch.Tensor | None,
    is_padding: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    spec, contract = _declared(declarations)
    topk_weights, topk_ids = _allocate(router_logits, spec, contract)
    _launch_of(impl)(
        router_logits, spec, contract, per_expert_scale, is_padding, num_valid_tokens, topk_weights, topk_ids
    )
    return topk_weights, topk_ids


@torch.library.impl("turnout::route_out", "CompositeExplicitAutograd")
def _route_out(
    router_logits: torch.Tensor,
    declarations: str,
    impl: str,
    per_expert_scale: torch.Tensor | None,
    is_padding: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    *,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    spec, contract = _declared(declarations)
    _launch_of(impl)(
        router_logits, spec, contract, per_expert_scale, is_padding, num_valid_tokens, topk_weights, topk_ids
    )


def _allocate(router_logits: torch.Tensor, spec: RouterSpec, contract: Contract) -> tuple[torch.Tensor, torch.Tensor]:
    shape, strides, device = (router_logits.shape[0], spec.top_k), (spec.top_k, 1), router_logits.device
    return (  # empty_strided is the cheapest way to a new tensor
        torch.empty_strided(shape, strides, dtype=contract.weights_dtype, device=device),
        torch.empty_strided(shape, strides, dtype=contract.ids_dtype, device=device),
    )


@torch.library.register_fake("turnout::route")
def _route_fake(router_logits: torch.Tensor, declarations: str, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _allocate(router_logits, *_declared(declarations))


@torch.library.register_fake("turnout::route_out")
def _route_out_fake(*_: object, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
    return None
