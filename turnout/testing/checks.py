"""What a right routing is: the rules as assertions, and the comparison with the oracle."""

from __future__ import annotations

import numpy as np
import torch

from turnout.contracts import Contract
from turnout.spec import RouterSpec
from turnout.testing.oracle import (
    NO_EXPERT,
    WEIGHTS_TOLERANCE,
    Bools,
    Floats,
    Ints,
    given_ids,
    may_be_selected,
    oracle,
    ranked,
    rounded,
    scale_of,
    weight_bounds,
)
from turnout.types import Routing, RoutingInputs

__all__ = [
    "WEIGHTS_TOLERANCE", "assert_bitwise_equal", "assert_load_counted", "assert_matches_oracle",
    "assert_routing_valid", "logical_ids", "oracle", "padding_rows",
]  # fmt: skip
_NO_INPUTS = RoutingInputs()
_HIDDEN = -2  # the logical id of a slot of which a map leaves none in the result


def assert_routing_valid(
    routing: Routing,
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    inputs: RoutingInputs = _NO_INPUTS,
) -> None:
    """Assert what holds of every routing, whatever the logits.

    Shapes, dtypes and device of the contract; K distinct ids in range, those of the highest ranked values inside of the
    best groups, in descending order where the spec sorts, ties to the lowest id; each id the one that a map gives its
    expert; weights finite where the dtype holds them, of the right sign and sum; slots that carry no work have the
    sentinel and weight 0; replayed ids are the logical ones.
    """
    _assert_form(routing, router_logits, spec, contract)
    ids, weights = _int64(routing.topk_ids), _float64(routing.topk_weights)
    logical, given = logical_ids(routing, spec, contract, inputs), given_ids(spec, inputs)
    padding = padding_rows(len(ids), inputs)
    want_idle = np.broadcast_to(padding[:, None], ids.shape) | (False if given is None else given == NO_EXPERT)
    assert ((logical == NO_EXPERT) == want_idle).all(), f"slots without an expert: {logical}, want {want_idle}"
    assert (logical < spec.num_experts).all(), f"ids outside [0, {spec.num_experts}): {logical}"
    _assert_mapped(ids, logical, spec, contract, inputs)
    idle = idle_slots(ids, logical, spec, contract)
    assert (weights[idle] == 0).all(), f"slots that carry no work have weights {weights}"
    overflows = ~np.isfinite(_weights_between(router_logits, spec, contract, inputs, logical)).all(axis=0)
    assert (np.isfinite(weights) | overflows).all(), f"weights are not finite: {weights}"

    if given is None:
        in_order = np.sort(np.where(logical >= 0, logical, -1 - np.arange(spec.top_k)), axis=-1)
        assert (in_order[:, 1:] != in_order[:, :-1]).all(), f"an expert was chosen twice: {logical}"
        known = np.asarray((logical >= 0).all(axis=-1))
        values = ranked(router_logits, spec, inputs).rows(known)
        assert may_be_selected(logical[known], values, spec).all(), f"not the best, or not best first: {logical}"
    scale = scale_of(np.maximum(logical, 0), spec, inputs)
    if spec.scoring_func != "none" or spec.selected_score != "none":
        assert (weights * np.sign(scale) >= 0).all(), f"weights have the wrong sign: {weights}"
    if (spec.renormalize or spec.selected_score == "softmax") and not spec.per_expert_scale:
        _assert_sum(
            weights[~idle.any(axis=-1)] / scale.flat[0] if scale.size else weights, router_logits, spec, contract
        )


def assert_matches_oracle(
    routing: Routing,
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    inputs: RoutingInputs = _NO_INPUTS,
) -> None:
    """Assert that ids equal the oracle's, and weights are roundings of what lies in its bounds.

    Ids may differ where the error of a float32 score decides; a spec that ranks logits leaves no such room.
    """
    _assert_form(routing, router_logits, spec, contract)
    _, want_ids = oracle(router_logits, spec, inputs)
    want_ids[padding_rows(len(want_ids), inputs)] = NO_EXPERT
    logical = logical_ids(routing, spec, contract, inputs)
    wrong = ((logical != want_ids) & (logical != _HIDDEN)).any(axis=-1)
    near = wrong & ((logical >= 0) & (logical < spec.num_experts)).all(axis=-1) & (given_ids(spec, inputs) is None)
    near[near] = may_be_selected(logical[near], ranked(router_logits, spec, inputs).rows(near), spec)
    wrong &= ~near
    assert not wrong.any(), f"ids of rows {np.flatnonzero(wrong)}: got {logical[wrong]}, want {want_ids[wrong]}"

    ids, weights = _int64(routing.topk_ids), _float64(routing.topk_weights)
    idle = idle_slots(ids, logical, spec, contract)
    lowest, highest = _weights_between(router_logits, spec, contract, inputs, logical)
    inside = (weights >= np.where(idle, 0, lowest)) & (weights <= np.where(idle, 0, highest))
    wrong = ~inside.all(axis=-1)
    assert not wrong.any(), (
        f"weights of rows {np.flatnonzero(wrong)}: got {weights[wrong]}, want from {lowest[wrong]} to {highest[wrong]}"
    )


def assert_bitwise_equal(one: Routing, other: Routing) -> None:
    """Assert that two routings have the same dtypes and the same bits."""
    for name in ("topk_weights", "topk_ids"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype, f"{name}: {a.dtype} and {b.dtype}"
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), f"{name} differ"


def assert_load_counted(
    before: torch.Tensor, routing: Routing, spec: RouterSpec, contract: Contract, inputs: RoutingInputs
) -> None:
    """Assert that ``inputs.expert_load`` is ``before`` plus the slots of each physical expert that carry work."""
    assert inputs.expert_load is not None
    ids = _int64(routing.topk_ids)
    counted = ~idle_slots(ids, logical_ids(routing, spec, contract, inputs), spec, contract)
    if inputs.num_counted_tokens is not None:
        counted &= np.arange(len(ids))[:, None] < _int64(inputs.num_counted_tokens)
    if inputs.record_load is not None:
        counted &= bool(inputs.record_load)
    num_experts = len(before)
    want = np.bincount(ids[counted & (ids < num_experts)], minlength=num_experts)
    got = _int64(inputs.expert_load) - _int64(before)
    assert (got == want).all(), f"load counts {got}, want {want}"


def padding_rows(num_tokens: int, inputs: RoutingInputs) -> Bools:
    """Which of the T rows carry no token."""
    padding = np.zeros(num_tokens, dtype=np.bool_)
    if inputs.is_padding is not None:
        padding |= inputs.is_padding.cpu().numpy()
    if inputs.num_valid_tokens is not None:
        padding |= np.arange(num_tokens) >= inputs.num_valid_tokens.cpu().numpy()
    return padding


def logical_ids(routing: Routing, spec: RouterSpec, contract: Contract, inputs: RoutingInputs) -> Ints:
    """The experts [T, K] of the model that a result speaks of; -1: none; -2: one that its map has no id for."""
    ids = _int64(routing.topk_ids)
    if inputs.replay_ids is not None:
        return _int64(inputs.replay_ids)
    padding, given = padding_rows(len(ids), inputs), given_ids(spec, inputs)
    if given is not None:
        return np.where(padding[:, None], NO_EXPERT, given)
    is_sentinel = ids == contract.sentinel_id(spec.num_experts)
    if contract.id_space == "logical":
        return np.where(is_sentinel, NO_EXPERT, ids)
    logical = np.where(padding[:, None] & is_sentinel, NO_EXPERT, _HIDDEN)
    for expert, physical in enumerate(_mapped_ids(spec, inputs)):
        logical[~is_sentinel & np.isin(ids, physical)] = expert
    assert ((logical != _HIDDEN) | is_sentinel).all(), f"ids that no expert is mapped to: {ids}"
    return logical


def idle_slots(ids: Ints, logical: Ints, spec: RouterSpec, contract: Contract) -> Bools:
    """Which slots [T, K] carry no work."""
    sentinel = contract.sentinel_id(spec.num_experts)
    return (logical < 0) if sentinel is None else (logical < 0) | (ids == sentinel)


def _mapped_ids(spec: RouterSpec, inputs: RoutingInputs) -> list[Ints]:
    """The ids that stand for each expert of the model where a map is given; one below 0 stands for none."""
    if inputs.expert_map is not None:
        return list(_int64(inputs.expert_map)[:, None])
    if inputs.logical_to_physical_map is None or inputs.logical_replica_count is None:
        return list(np.arange(spec.num_experts)[:, None])
    counts = np.maximum(_int64(inputs.logical_replica_count), 1)
    return [row[:count] for row, count in zip(_int64(inputs.logical_to_physical_map), counts, strict=True)]


def _assert_mapped(ids: Ints, logical: Ints, spec: RouterSpec, contract: Contract, inputs: RoutingInputs) -> None:
    """Each id stands for its expert, or is the sentinel where there is none (0 where the contract has no sentinel)."""
    sentinel = contract.sentinel_id(spec.num_experts)
    none = np.array([0 if sentinel is None else sentinel])
    mapped = _mapped_ids(spec, inputs)
    num_ids = contract.num_ids(spec.num_experts) if contract.id_space == "local" else np.iinfo(np.int64).max
    for expert in np.unique(logical):
        allowed = mapped[expert] if expert >= 0 else none
        allowed = np.where((allowed >= 0) & (allowed < num_ids) | (expert < 0), allowed, none)
        got = ids[logical == expert]
        assert np.isin(got, allowed).all(), f"expert {expert} got ids {got}, want {allowed}"


def _weights_between(
    router_logits: torch.Tensor, spec: RouterSpec, contract: Contract, inputs: RoutingInputs, logical: Ints
) -> tuple[Floats, Floats]:
    """The lowest and the highest weight that each of these experts may have in the contract's dtype."""
    lowest, highest = weight_bounds(router_logits, spec, inputs, logical)
    # Rounding keeps order: rounded bounds hold the rounding of every weight between them.
    for dtype in _roundings(router_logits, spec, contract):
        lowest, highest = rounded(lowest, dtype), rounded(highest, dtype)
    return lowest, highest


def _assert_sum(weights: Floats, router_logits: torch.Tensor, spec: RouterSpec, contract: Contract) -> None:
    """The weights of a row, without the scale, sum to 1; to less where a summand or a bound was in their divisor."""
    # Each of the K weights is off by half a unit of the coarser of the two dtypes it was rounded to.
    unit = max(torch.finfo(dtype).eps for dtype in _roundings(router_logits, spec, contract))
    total, tolerance = weights.sum(axis=-1), unit + spec.top_k * WEIGHTS_TOLERANCE
    assert (total <= 1 + tolerance).all(), f"sums: {total}"
    if spec.selected_score == "softmax" or spec.renormalize_eps == spec.renormalize_min == 0:
        assert (total >= 1 - tolerance).all(), f"sums: {total}"


def _assert_form(routing: Routing, router_logits: torch.Tensor, spec: RouterSpec, contract: Contract) -> None:
    shape = (router_logits.shape[0], spec.top_k)
    for name, dtype in (("topk_weights", contract.weights_dtype), ("topk_ids", contract.ids_dtype)):
        tensor = getattr(routing, name)
        assert tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"
        assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, the contract says {dtype}"
        assert tensor.device == router_logits.device, f"{name} is on {tensor.device}"
        assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}"


def _roundings(router_logits: torch.Tensor, spec: RouterSpec, contract: Contract) -> list[torch.dtype]:
    """The dtypes that a weight is rounded to, one after the other."""
    by_model = [router_logits.dtype] if spec.weights_rounding == "input" else []
    return [torch.float32, *by_model, contract.weights_dtype]


def _float64(tensor: torch.Tensor) -> Floats:
    return np.asarray(tensor.detach().cpu().double().numpy(), dtype=np.float64)


def _int64(tensor: torch.Tensor) -> Ints:
    return np.asarray(tensor.cpu().numpy(), dtype=np.int64)
