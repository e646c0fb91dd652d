"""The mathematics of routing in plain torch: short, slow, and what every kernel is compared with."""

from __future__ import annotations

import torch

from turnout.contracts import Contract
from turnout.device import REPLICA_HASH
from turnout.routing.inputs import RoutingTensors
from turnout.routing.scores import capped, scores, sigmoid, tree_sum
from turnout.spec import RouterSpec


def route_reference(
    router_logits: torch.Tensor, spec: RouterSpec, tensors: RoutingTensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, K] float32 and logical ids [T, K] int64 of every row; padding and maps are not considered."""
    values = capped(router_logits.float(), spec)
    if tensors.given_ids is None:
        topk_ids = select(router_logits.float(), values, spec, tensors.e_score_correction_bias, router_logits.dtype)
    else:
        topk_ids = given_ids(tensors.given_ids, tensors.input_ids, spec.num_experts)
    weights = weigh(values, topk_ids, spec, router_logits.dtype)
    if tensors.per_expert_scale is not None:
        weights = weights * tensors.per_expert_scale.float()[topk_ids.clamp_min(0)]
    weights = weights * spec.routed_scaling_factor
    if spec.divide_by_top_k:
        weights = weights / spec.top_k
    if spec.weights_rounding == "input":
        weights = weights.to(router_logits.dtype).float()
    return weights, topk_ids


def select(
    logits: torch.Tensor, values: torch.Tensor, spec: RouterSpec, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The K experts of the highest ranked value in descending order, ties to the lowest id, NaN below every number.

    The ranked value is the score (plus bias), or where the spec ranks no scores, the logit: all scores are monotone.
    """
    ranked = logits
    if spec.ranks_scores:
        ranked = scores(values, spec, dtype)
        if bias is not None:
            ranked = ranked + bias.float()
        ranked = torch.where(logits.isnan(), torch.nan, ranked)
    if spec.topk_group < spec.num_expert_group:
        ranked = torch.where(in_best_groups(ranked, spec), ranked, 0.0 if spec.fills_with_zero else -torch.inf)
    return descending(ranked)[:, : spec.top_k]


def in_best_groups(ranked: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """Which experts [T, E] lie in the groups that the selection keeps."""
    grouped = ranked.unflatten(1, (spec.num_expert_group, -1))
    best = grouped.gather(2, descending(grouped)[:, :, :2])  # the two best of each group, where there are two
    group_scores = best[:, :, 0] if spec.group_score == "max" else best.sum(dim=2)
    kept = descending(group_scores)[:, : spec.topk_group]
    is_kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, kept, True)
    return is_kept[:, :, None].expand_as(grouped).flatten(1)


def given_ids(table: torch.Tensor, input_ids: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    """The ids that the caller gave, by token or by row, in place of a selection; -1 for what is no expert."""
    if input_ids is not None:
        is_known = (input_ids >= 0) & (input_ids < len(table))
        table = torch.where(is_known[:, None], table[torch.where(is_known, input_ids, 0).long()], -1)
    ids = table.long()
    return torch.where((ids >= 0) & (ids < num_experts), ids, -1)


def weigh(values: torch.Tensor, topk_ids: torch.Tensor, spec: RouterSpec, dtype: torch.dtype) -> torch.Tensor:
    """The weights [T, K] of the selected experts, before the factors on them; the norm leaves out what is no expert."""
    is_none, topk_ids = topk_ids < 0, topk_ids.clamp_min(0)
    selected = values.gather(1, topk_ids).masked_fill(is_none, -torch.inf)
    if spec.weighs_by_shares:
        return softmax_shares(values, selected, spec)
    by_selected = spec.selected_score == "sigmoid"
    weights = sigmoid(selected) if by_selected else scores(values, spec, dtype).gather(1, topk_ids)
    if spec.renormalize:
        weights = weights.masked_fill(is_none, 0.0)
        total = (tree_sum(weights) + spec.renormalize_eps).clamp_min(spec.renormalize_min)
        # Where nothing selected has any weight, all K share equally.
        weights = torch.where(total == 0, 1 / spec.top_k, weights / torch.where(total == 0, 1.0, total))
    return weights


def softmax_shares(values: torch.Tensor, selected: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """The softmax of the selected values among themselves, or among all."""
    best = (selected if spec.shares_among_selected else values).amax(dim=1, keepdim=True)
    mass = unnormalized_softmax(selected, best)
    if spec.shares_among_selected:
        total = tree_sum(mass)
    else:
        total = tree_sum(unnormalized_softmax(values, best))
        total = torch.where(best == -torch.inf, float(spec.top_k), total)  # nothing but -inf: K equal shares
    return mass / total


def descending(values: torch.Tensor) -> torch.Tensor:
    """Indices along the last dimension in descending order, ties to the lowest, NaN below every number."""
    return torch.sort(ordered_key(values), dim=-1, descending=True, stable=True).indices


def ordered_key(values: torch.Tensor) -> torch.Tensor:
    """int32 keys that order float32 values as numbers: -0.0 equals +0.0, NaN lies below -inf."""
    bits = torch.where(values == 0, 0.0, values).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return torch.where(values.isnan(), torch.iinfo(torch.int32).min, keys)


def unnormalized_softmax(values: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """``exp(values - best)``, and 1 where they are equal: also for infinities, which then share alike."""
    return torch.where(values == best, 1.0, torch.exp(values - best))


def launch(
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    tensors: RoutingTensors,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    """Route into the two buffers, count the load and keep the logical ids where buffers for these are given."""
    weights, ids = route_reference(router_logits, spec, tensors)
    rows = torch.arange(len(ids), device=ids.device)
    is_idle = ids < 0  # slots that carry no work
    if tensors.is_padding is not None:
        is_idle = is_idle | tensors.is_padding[:, None]
    if tensors.num_valid_tokens is not None:
        is_idle = is_idle | (rows >= tensors.num_valid_tokens)[:, None]
    if tensors.replay_ids is not None:
        tensors.replay_ids.copy_(ids.masked_fill(is_idle, -1))
    num_ids = contract.num_ids(spec.num_experts)
    if tensors.expert_map is not None:
        ids = tensors.expert_map.long()[ids.clamp_min(0)]
        is_idle = is_idle | (ids < 0) | (ids >= num_ids)
    if tensors.logical_to_physical_map is not None:
        ids = physical_ids(ids.clamp_min(0), tensors)
        is_idle = is_idle | (ids < 0)
    if tensors.expert_load is not None:
        count_load(ids.masked_fill(is_idle, -1), rows, tensors)
    sentinel = contract.sentinel_id(spec.num_experts)
    topk_weights.copy_(weights.masked_fill(is_idle, 0.0))
    topk_ids.copy_(ids.masked_fill(is_idle, 0 if sentinel is None else sentinel))


def physical_ids(ids: torch.Tensor, tensors: RoutingTensors) -> torch.Tensor:
    """The replica of each logical expert that serves a row: the same for all its slots, spread by a hash of the row."""
    assert tensors.logical_to_physical_map is not None
    assert tensors.logical_replica_count is not None
    hashed = (torch.arange(len(ids), device=ids.device) * REPLICA_HASH) & 0xFFFFFFFF
    num_replicas = tensors.logical_replica_count.long()[ids].clamp_min(1)
    return tensors.logical_to_physical_map.long()[ids, hashed[:, None] % num_replicas]


def count_load(ids: torch.Tensor, rows: torch.Tensor, tensors: RoutingTensors) -> None:
    """Add to each physical expert's load how many slots chose it."""
    assert tensors.expert_load is not None
    num_experts = len(tensors.expert_load)
    is_counted = (ids >= 0) & (ids < num_experts)
    if tensors.num_counted_tokens is not None:
        is_counted = is_counted & (rows < tensors.num_counted_tokens)[:, None]
    if tensors.record_load is not None:
        is_counted = is_counted & (tensors.record_load != 0)
    counted = torch.where(is_counted, ids, num_experts).flatten()  # the rest goes to a bin past the end
    ones = torch.ones_like(counted, dtype=tensors.expert_load.dtype)
    load = torch.zeros(num_experts + 1, dtype=tensors.expert_load.dtype, device=ids.device)
    tensors.expert_load.add_(load.scatter_add(0, counted, ones)[:num_experts])
