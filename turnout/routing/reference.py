"""The mathematics of routing in plain torch: short, slow, and what every kernel is compared with."""

from __future__ import annotations

import torch

from turnout.contracts import Contract
from turnout.spec import RouterSpec


def route_reference(
    router_logits: torch.Tensor,
    spec: RouterSpec,
    per_expert_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, K] float32 and ids [T, K] int64 of every row, padding not considered.

    The ids are the K experts of the highest logit in descending order, ties to the lowest id, NaN below every
    number; softmax is monotone, so ranking logits ranks probabilities.
    """
    logits = router_logits.float()
    topk_ids = torch.sort(ordered_key(logits), dim=-1, descending=True, stable=True).indices[:, : spec.top_k]
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    selected = logits.gather(1, topk_ids)
    best = selected[:, :1]
    mass = unnormalized_softmax(selected, best)
    if spec.renormalize:
        total = tree_sum(mass)
    else:
        total = tree_sum(unnormalized_softmax(logits, best))
        total = torch.where(best == -torch.inf, float(spec.top_k), total)  # nothing but -inf: K equal shares
    weights = mass / total
    if per_expert_scale is not None:
        weights = weights * per_expert_scale.float()[topk_ids]
    weights = weights * spec.routed_scaling_factor
    if spec.weights_rounding == "input":
        weights = weights.to(router_logits.dtype).float()
    return weights, topk_ids


def ordered_key(values: torch.Tensor) -> torch.Tensor:
    """int32 keys that order float32 values as numbers: -0.0 equals +0.0, NaN lies below -inf."""
    bits = torch.where(values == 0, 0.0, values).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return torch.where(values.isnan(), torch.iinfo(torch.int32).min, keys)


def unnormalized_softmax(logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """``exp(logits - best)``, and 1 where they are equal: also for infinities, which then share alike."""
    return torch.where(logits == best, 1.0, torch.exp(logits - best))


def tree_sum(values: torch.Tensor) -> torch.Tensor:
    """Row sums by halves, padded to a power of two: the same rounding for any batch and any kernel."""
    width = 1 << (values.shape[1] - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, width - values.shape[1]))
    while width > 1:
        width //= 2
        values = values[:, :width] + values[:, width:]
    return values


def launch(
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    tensors: tuple[torch.Tensor | None, ...],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    """Route into the two buffers."""
    per_expert_scale, is_padding, num_valid_tokens, expert_map = tensors
    weights, ids = route_reference(router_logits, spec, per_expert_scale)
    is_idle = torch.zeros_like(ids, dtype=torch.bool)  # slots that carry no work
    if expert_map is not None:
        ids = expert_map.long()[ids]
        is_idle |= (ids < 0) | (ids >= contract.num_ids(spec.num_experts))
    if is_padding is not None:
        is_idle |= is_padding[:, None]
    if num_valid_tokens is not None:
        is_idle |= (torch.arange(len(ids), device=ids.device) >= num_valid_tokens)[:, None]
    if not (is_padding is num_valid_tokens is expert_map is None):
        sentinel = contract.sentinel_id(spec.num_experts)
        assert sentinel is not None, "route refuses padding and local ids for a contract without sentinel"
        weights, ids = weights.masked_fill(is_idle, 0.0), ids.masked_fill(is_idle, sentinel)
    topk_weights.copy_(weights)
    topk_ids.copy_(ids)
