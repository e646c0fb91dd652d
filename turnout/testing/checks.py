"""What a right routing is: the rules as assertions, and an oracle that shares no code with any implementation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from turnout.contracts import Contract
from turnout.spec import RouterSpec
from turnout.types import Routing, RoutingInputs

# Of a float32 weight, times the scales: three roundings and the error of one exp.
WEIGHTS_TOLERANCE = 2e-7
_NO_INPUTS = RoutingInputs()

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def assert_routing_valid(
    routing: Routing,
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    inputs: RoutingInputs = _NO_INPUTS,
) -> None:
    """Assert what holds of every routing, whatever the logits.

    Shapes, dtypes and device of the contract; K distinct ids in range, in descending order of the logit, ties
    to the lowest id; finite weights of the right sign; padding carries the sentinel and weight 0.
    """
    _assert_form(routing, router_logits, spec, contract)
    ids, weights = _int64(routing.topk_ids), _float64(routing.topk_weights)
    padding = padding_rows(len(ids), inputs)
    assert (ids[padding] == _sentinel(spec, contract)).all(), f"padding carries ids {ids[padding]}"
    assert (weights[padding] == 0).all(), f"padding carries weights {weights[padding]}"

    ids, weights, values = ids[~padding], weights[~padding], _float64(router_logits)[~padding]
    assert ((ids >= 0) & (ids < spec.num_experts)).all(), f"ids outside [0, {spec.num_experts}): {ids}"
    in_order = np.sort(ids, axis=-1)
    assert (in_order[:, 1:] != in_order[:, :-1]).all(), f"an expert was chosen twice: {ids}"
    _assert_best_first(ids, values)

    assert np.isfinite(weights).all(), f"weights are not finite: {weights}"
    scale = _scale_of(ids, spec, inputs)
    assert (weights * np.sign(scale) >= 0).all(), f"weights have the wrong sign: {weights}"
    if spec.renormalize and not spec.per_expert_scale:
        # Each of the K weights is off by half a unit of the coarser of the two dtypes it was rounded to.
        unit = max(torch.finfo(dtype).eps for dtype in _roundings(router_logits, spec, contract))
        total = weights.sum(axis=-1) / spec.routed_scaling_factor
        assert np.allclose(total, 1.0, rtol=0, atol=unit + spec.top_k * WEIGHTS_TOLERANCE), f"sums: {total}"


def assert_matches_oracle(
    routing: Routing,
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    inputs: RoutingInputs = _NO_INPUTS,
) -> None:
    """Assert that ids equal the oracle's and weights lie within one rounding of its float64 weights.

    A float32 weight may be off by `WEIGHTS_TOLERANCE` times its scales; a 16-bit one must be the rounding of
    a float32 weight within that.
    """
    _assert_form(routing, router_logits, spec, contract)
    want, want_ids = oracle(router_logits, spec, inputs)
    tolerance = np.abs(_scale_of(want_ids, spec, inputs)) * WEIGHTS_TOLERANCE
    padding = padding_rows(len(want_ids), inputs)
    if padding.any():
        want_ids[padding] = _sentinel(spec, contract)
        want[padding] = tolerance[padding] = 0
    ids, weights = _int64(routing.topk_ids), _float64(routing.topk_weights)
    wrong = (ids != want_ids).any(axis=-1)
    assert not wrong.any(), f"ids of rows {np.flatnonzero(wrong)}: got {ids[wrong]}, want {want_ids[wrong]}"
    # Rounding keeps order: rounded bounds hold the rounding of every weight between them.
    lowest, highest = want - tolerance, want + tolerance
    for dtype in _roundings(router_logits, spec, contract):
        lowest, highest = _rounded(lowest, dtype), _rounded(highest, dtype)
    wrong = ((weights < lowest) | (weights > highest) | np.isnan(weights)).any(axis=-1)
    assert not wrong.any(), f"weights of rows {np.flatnonzero(wrong)}: got {weights[wrong]}, want {want[wrong]}"


def assert_bitwise_equal(one: Routing, other: Routing) -> None:
    """Assert that two routings have the same dtypes and the same bits."""
    for name in ("topk_weights", "topk_ids"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype, f"{name}: {a.dtype} and {b.dtype}"
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), f"{name} differ"


def oracle(router_logits: torch.Tensor, spec: RouterSpec, inputs: RoutingInputs = _NO_INPUTS) -> tuple[Floats, Ints]:
    """Weights [T, K] in float64, not rounded, and ids [T, K], padding not considered.

    A softmax router written from the rules: a stable sort that puts NaN last, and shares of a mass of 1.
    """
    values = _float64(router_logits)
    is_nan = np.isnan(values)
    ids = np.lexsort((-np.where(is_nan, 0.0, values), is_nan), axis=-1)[:, : spec.top_k]
    shares = _softmax_shares(values)
    chosen = np.take_along_axis(shares, ids, axis=-1)
    nothing = ~(chosen > 0).any(axis=-1)
    chosen[nothing] = 1 / spec.top_k
    if spec.renormalize:
        chosen /= chosen.sum(axis=-1, keepdims=True)
    return chosen * _scale_of(ids, spec, inputs), ids


def padding_rows(num_tokens: int, inputs: RoutingInputs) -> Bools:
    """Which of the T rows carry no token."""
    padding = np.zeros(num_tokens, dtype=np.bool_)
    if inputs.is_padding is not None:
        padding |= inputs.is_padding.cpu().numpy()
    if inputs.num_valid_tokens is not None:
        padding |= np.arange(num_tokens) >= inputs.num_valid_tokens.cpu().numpy()
    return padding


def _softmax_shares(values: Floats) -> Floats:
    """The softmax of each row: +inf entries share all of it, NaN and -inf have none of it."""
    finite = np.isfinite(values)
    largest = np.max(values, axis=-1, keepdims=True, where=finite, initial=-np.finfo(np.float64).max)
    mass = np.exp(np.where(finite, values - np.where(finite, largest, 0), -np.inf))
    infinite = values == np.inf
    mass = np.where(infinite.any(axis=-1, keepdims=True), infinite, mass)
    total = mass.sum(axis=-1, keepdims=True)
    return np.asarray(mass / np.where(total > 0, total, 1), dtype=np.float64)


def _assert_form(routing: Routing, router_logits: torch.Tensor, spec: RouterSpec, contract: Contract) -> None:
    shape = (router_logits.shape[0], spec.top_k)
    for name, dtype in (("topk_weights", contract.weights_dtype), ("topk_ids", contract.ids_dtype)):
        tensor = getattr(routing, name)
        assert tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"
        assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, the contract says {dtype}"
        assert tensor.device == router_logits.device, f"{name} is on {tensor.device}"
        assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}"


def _assert_best_first(ids: Ints, values: Floats) -> None:
    """Each chosen expert, and every expert not chosen, ranks below the one chosen before it."""
    chosen = np.take_along_axis(values, ids, axis=-1)
    assert _ranks_above(chosen[:, :-1], ids[:, :-1], chosen[:, 1:], ids[:, 1:]).all(), f"not descending: {ids}"
    is_chosen = np.zeros(values.shape, dtype=np.bool_)
    np.put_along_axis(is_chosen, ids, True, axis=-1)
    beaten = _ranks_above(chosen[:, -1:], ids[:, -1:], values, np.arange(values.shape[1]))
    assert (is_chosen | beaten).all(), f"a better expert was left out of {ids}"


def _ranks_above(value: Floats, expert: Ints, other: Floats, other_expert: Ints) -> Bools:
    tied = (value == other) | (np.isnan(value) & np.isnan(other))
    above = (value > other) | (~np.isnan(value) & np.isnan(other))
    return np.asarray(np.where(tied, expert < other_expert, above), dtype=np.bool_)


def _scale_of(ids: Ints, spec: RouterSpec, inputs: RoutingInputs) -> Floats:
    """The factor [T, K] of each weight."""
    factor = np.full(ids.shape, spec.routed_scaling_factor)
    return factor if inputs.per_expert_scale is None else factor * _float64(inputs.per_expert_scale)[ids]


def _sentinel(spec: RouterSpec, contract: Contract) -> int:
    if contract.sentinel == "num_experts":
        return spec.num_experts
    return -1 if contract.sentinel is None else contract.sentinel


def _roundings(router_logits: torch.Tensor, spec: RouterSpec, contract: Contract) -> list[torch.dtype]:
    """The dtypes that a weight is rounded to, one after the other."""
    by_model = [router_logits.dtype] if spec.weights_rounding == "input" else []
    return [torch.float32, *by_model, contract.weights_dtype]


def _rounded(values: Floats, dtype: torch.dtype) -> Floats:
    return _float64(torch.from_numpy(values).to(dtype))


def _float64(tensor: torch.Tensor) -> Floats:
    return np.asarray(tensor.detach().cpu().double().numpy(), dtype=np.float64)


def _int64(tensor: torch.Tensor) -> Ints:
    return np.asarray(tensor.cpu().numpy(), dtype=np.int64)
