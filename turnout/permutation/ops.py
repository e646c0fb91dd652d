"""The operators ``turnout::permute`` and ``turnout::route_permuted``, as torch's dispatcher and compiler see them.

Results are those structures that the contract asks for, in the order of `turnout.Permutation`; those of the second,
which spans routing and permutation, begin with weights and ids.
"""

from __future__ import annotations

import functools

import torch

from turnout.contracts import STRUCTURES, Contract
from turnout.device import SCHEDULE_BLOCK_SIZES
from turnout.impls import launch_of
from turnout.operators import operator
from turnout.routing import ops as _routing
from turnout.routing.inputs import RoutingTensors
from turnout.types import Permutation, Routing

_INPUTS = "Tensor topk_ids, Tensor? topk_weights, int num_experts, str contract, str impl"

contract_of = functools.cache(Contract.from_key)


def _permute_fake(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor | None, num_experts: int, contract: str, impl: str
) -> list[torch.Tensor]:
    return allocate(topk_ids, topk_ids.shape[1], num_experts, contract_of(contract))


@operator(f"turnout::permute({_INPUTS}) -> Tensor[]", _permute_fake)
def permute(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor | None, num_experts: int, contract: str, impl: str
) -> list[torch.Tensor]:
    """The structures of the contract, in new buffers."""
    declared = contract_of(contract)
    buffers = allocate(topk_ids, topk_ids.shape[1], num_experts, declared)
    launch_of("permutation", impl)(topk_ids, topk_weights, num_experts, declared, permutation_of(buffers, declared))
    return buffers


def _allocate_routing(router_logits: torch.Tensor, declarations: str, *_: object) -> list[torch.Tensor]:
    spec, contract = _routing.declared(declarations)
    structures = allocate(router_logits, spec.top_k, contract.num_ids(spec.num_experts), contract)
    return [*_routing.allocate(router_logits, spec, contract), *structures]


@operator(f"turnout::route_permuted({_routing.INPUTS}) -> Tensor[]", _allocate_routing)
def route_permuted(
    router_logits: torch.Tensor,
    declarations: str,
    impl: str,
    *tensors: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Weights, ids and the structures of the contract, in new buffers."""
    spec, contract = _routing.declared(declarations)
    results = _allocate_routing(router_logits, declarations)
    routing = routing_of(results, contract)
    launch_of("permutation", impl, "launch_routed")(router_logits, spec, contract, RoutingTensors(*tensors), routing)
    return results


def permutation_of(buffers: list[torch.Tensor], contract: Contract) -> Permutation:
    """The operator's results, by name."""
    remaining = iter(buffers)
    return Permutation(*[next(remaining) if name in contract.structures else None for name in STRUCTURES])


def routing_of(results: list[torch.Tensor], contract: Contract) -> Routing:
    """The results of ``route_permuted``, by name."""
    return Routing(results[0], results[1], *permutation_of(results[2:], contract))


def max_blocks(num_slots: int, num_experts: int, block_size: int) -> int:
    """Blocks of one expert each that so many slots fill at most."""
    return (num_slots + torch.sym_min(num_slots, num_experts) * (block_size - 1)) // block_size  # type: ignore[no-any-return]


@functools.cache
def _asked_for(structures: tuple[str, ...]) -> tuple[str, ...]:
    """The names in the order of `turnout.Permutation`."""
    return tuple(name for name in STRUCTURES if name in structures)


def allocate(beside: torch.Tensor, top_k: int, num_experts: int, contract: Contract) -> list[torch.Tensor]:
    """Buffers for what the contract asks for, where ``beside`` [T, any] lies, in the order of `turnout.Permutation`."""
    num_tokens, device = beside.shape[0], beside.device
    num_slots, block_size = num_tokens * top_k, contract.block_size or 1
    buffers = []
    for name in _asked_for(contract.structures):
        dtype = contract.structures_dtype
        shape: tuple[int, ...]
        match name:
            case "tokens_per_expert":
                shape = (num_experts,)
            case "expert_offsets":
                shape = (num_experts + 1,)
            case "permuted_idx":
                shape = (num_slots,)
            case "inv_permuted_idx":
                shape = (num_tokens, top_k)
            case "sorted_token_ids":
                shape = (max_blocks(num_slots, num_experts, block_size) * block_size,)
            case "expert_ids":
                shape = (max_blocks(num_slots, num_experts, block_size),)
            case "num_tokens_post_padded":
                shape = (1,)
            case "bitmatrix":
                shape, dtype = (num_tokens, -(-num_experts // 32)), torch.uint32
            case "permuted_weights":
                shape, dtype = (num_slots,), contract.weights_dtype
            case "block_offsets":
                shape = (len(SCHEDULE_BLOCK_SIZES), num_experts + 1)
            case "block_schedule":
                shape = (len(SCHEDULE_BLOCK_SIZES), max_blocks(num_slots, num_experts, SCHEDULE_BLOCK_SIZES[0]))
        strides = (shape[1], 1) if len(shape) == 2 else (1,)
        buffers.append(torch.empty_strided(shape, strides, dtype=dtype, device=device))
    return buffers
