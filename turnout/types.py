"""What routing takes beside the logits, and what it gives."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoutingInputs:
    """Every per-call tensor of `turnout.route`; absent ones are None.

    T tokens, E experts of the spec, K experts per token. Parameters are arguments of each call, never kept:
    a new tensor takes effect at once. Fields that `route` does not support yet raise NotImplementedError.

    Attributes:
        per_expert_scale: [E] float32, bfloat16 or float16; multiplies the weight of each chosen expert.
        e_score_correction_bias: [E] float; added to the scores for selection only.
        is_padding: [T] bool; True marks a row that carries no token.
        num_valid_tokens: [1] int32 on the device; rows from it on are padding.
        input_ids: [T] int64; token ids, for routers that look experts up by token.
        tid2eid: [V, K] integer; the experts of each token id.
        forced_ids: [T, K] integer; experts to take in place of the selection (routing replay).
        expert_map: [E] int32; logical to local expert, -1 where not local.
        logical_to_physical_map: [E, R] int64; the replicas of each expert (EPLB).
        logical_replica_count: [E] int64; how many replicas each expert has.
        expert_load: [P] int32; counts to which the routed tokens are added.
        replay_ids: [T, K] int16; buffer that receives the logical ids, before any map.
    """

    per_expert_scale: torch.Tensor | None = None
    e_score_correction_bias: torch.Tensor | None = None
    is_padding: torch.Tensor | None = None
    num_valid_tokens: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    tid2eid: torch.Tensor | None = None
    forced_ids: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None
    logical_to_physical_map: torch.Tensor | None = None
    logical_replica_count: torch.Tensor | None = None
    expert_load: torch.Tensor | None = None
    replay_ids: torch.Tensor | None = None


class Routing(NamedTuple):
    """The result of `turnout.route`, in the dtypes of the contract; fields not asked for are None.

    A NamedTuple, and so a pytree. S = T * K slots; slot ``t * K + k`` is the k-th expert of token t.
    """

    topk_weights: torch.Tensor  # [T, K] contract.weights_dtype
    topk_ids: torch.Tensor  # [T, K] contract.ids_dtype, in descending order of the ranked value
    tokens_per_expert: torch.Tensor | None = None  # [E] int32, how many slots chose each expert
    expert_offsets: torch.Tensor | None = None  # [E + 1] int32, starts with 0, ends with S
    permuted_idx: torch.Tensor | None = None  # [S] int32, sorted by expert: position -> slot
    inv_permuted_idx: torch.Tensor | None = None  # [T, K] int32, slot -> position
    sorted_token_ids: torch.Tensor | None = None  # [padded S] int32, slots in blocks of one expert each
    expert_ids: torch.Tensor | None = None  # [blocks] int32, the expert of each block
    num_tokens_post_padded: torch.Tensor | None = None  # [1] int32, how much of sorted_token_ids is used
    bitmatrix: torch.Tensor | None = None  # [T, ceil(E / 32)] uint32, bit e of row t: t chose e
