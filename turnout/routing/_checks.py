"""What `turnout.route` checks of the inputs that only some routers and consumers have."""

from __future__ import annotations

from typing import NoReturn

import torch

from turnout.contracts import Contract
from turnout.impls import check_tensor
from turnout.spec import RouterSpec
from turnout.types import RoutingInputs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def check_further_inputs(
    router_logits: torch.Tensor, spec: RouterSpec, contract: Contract, inputs: RoutingInputs
) -> None:
    """Check selection bias, given ids, the map to physical experts, load and replay buffers.

    Raises:
        ValueError: an input that spec or contract name is missing, one that they do not name is given, or one has
            another shape, dtype or device than it must have.
    """
    beside = ("router_logits", router_logits)
    bias = inputs.e_score_correction_bias
    if (bias is None) == spec.e_score_correction_bias:
        refuse_mismatch(
            "the spec", "e_score_correction_bias", spec.e_score_correction_bias, "e_score_correction_bias", bias
        )
    if bias is not None:
        check_tensor("e_score_correction_bias", bias, (spec.num_experts,), FLOATS, beside)
    _check_given_ids(router_logits, spec, inputs)
    _check_physical(router_logits, spec, contract, inputs)
    if inputs.replay_ids is not None:
        if spec.num_experts - 1 > torch.iinfo(torch.int16).max:
            raise ValueError(f"replay_ids of int16 cannot hold the ids of {spec.num_experts} experts")
        shape = (router_logits.shape[0], spec.top_k)
        check_tensor("replay_ids", inputs.replay_ids, shape, (torch.int16,), beside)


def refuse_mismatch(who: str, field: str, value: object, name: str, given: object) -> NoReturn:
    """Say that an input is missing, or given where a declaration has no use for it."""
    raise ValueError(
        f"{who} has {field}={value!r}, but RoutingInputs.{name} is {'missing' if given is None else 'given'}"
    )


def _check_given_ids(router_logits: torch.Tensor, spec: RouterSpec, inputs: RoutingInputs) -> None:
    num_tokens, beside = router_logits.shape[0], ("router_logits", router_logits)
    for name in ("input_ids", "tid2eid"):
        given = getattr(inputs, name)
        if (given is None) == spec.hash_routing:
            refuse_mismatch("the spec", "hash_routing", spec.hash_routing, name, given)
    if inputs.tid2eid is not None and inputs.input_ids is not None:
        check_tensor("input_ids", inputs.input_ids, (num_tokens,), INTEGERS, beside)
        check_tensor("tid2eid", inputs.tid2eid, (None, spec.top_k), INTEGERS, beside)
        if inputs.tid2eid.shape[0] == 0:
            raise ValueError("tid2eid has no rows, and must have one for each token id of the vocabulary")
    if inputs.forced_ids is None:
        return
    if spec.hash_routing:
        raise ValueError("forced_ids contradict hash_routing: ids come from one of them; leave forced_ids away")
    check_tensor("forced_ids", inputs.forced_ids, (num_tokens, spec.top_k), (torch.int16, *INTEGERS), beside)


def _check_physical(router_logits: torch.Tensor, spec: RouterSpec, contract: Contract, inputs: RoutingInputs) -> None:
    beside = ("router_logits", router_logits)
    to_physical, count = inputs.logical_to_physical_map, inputs.logical_replica_count
    for name, given in (("logical_to_physical_map", to_physical), ("logical_replica_count", count)):
        if (given is None) == (contract.id_space == "physical"):
            refuse_mismatch("the contract", "id_space", contract.id_space, name, given)
    if to_physical is not None and count is not None:
        replicas = to_physical.shape[1] if to_physical.dim() == 2 else 1
        check_tensor("logical_to_physical_map", to_physical, (spec.num_experts, replicas), (torch.int64,), beside)
        check_tensor("logical_replica_count", count, (spec.num_experts,), (torch.int64,), beside)
    load = inputs.expert_load
    if load is None:
        for name in ("record_load", "num_counted_tokens"):
            if getattr(inputs, name) is not None:
                raise ValueError(f"RoutingInputs.{name} is given, but there is no expert_load to add to")
        return
    if to_physical is None:
        refuse_mismatch("the contract", "id_space", contract.id_space, "expert_load", load)
    check_tensor("expert_load", load, (load.numel(),), (torch.int32,), beside)
    if load.numel() - 1 > torch.iinfo(contract.ids_dtype).max:
        raise ValueError(f"ids_dtype={contract.ids_dtype} cannot hold the ids of {load.numel()} physical experts")
    for name, dtype in (("record_load", torch.bool), ("num_counted_tokens", torch.int32)):
        flag = getattr(inputs, name)
        if flag is not None:
            check_tensor(name, flag, () if flag.dim() == 0 else (1,), (dtype,), beside)
