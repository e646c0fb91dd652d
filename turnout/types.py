"""The tensors that go into the stations of a layer, and those that they hand on."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoutingInputs:
    """Every per-call tensor of `turnout.route`; absent ones are None.

    T tokens, E experts of the spec, K experts per token, V token ids, P physical experts. Parameters are arguments of
    each call, never kept: a new tensor takes effect at once.

    Attributes:
        per_expert_scale: [E] float32, bfloat16 or float16; multiplies the weight of each chosen expert.
        e_score_correction_bias: [E] float32, bfloat16 or float16; added to the scores for selection only.
        is_padding: [T] bool; True marks a row that carries no token.
        num_valid_tokens: [1] int32 on the device; rows from it on are padding.
        input_ids: [T] int32 or int64; token ids, for routers that look experts up by token. A row whose id is none of
            the table's has no experts: the sentinel (0 where the contract has none) and weight 0.
        tid2eid: [V, K] int32 or int64; the experts of each token id.
        forced_ids: [T, K] int16, int32 or int64; logical experts to take in place of the selection (routing replay). An
            id that is no expert, here or in ``tid2eid``, becomes the sentinel (0 where the contract has none), with
            weight 0, and the norm of its row leaves it out.
        expert_map: [E] int32; logical to local expert, -1 where not local.
        logical_to_physical_map: [E, R] int64; the replicas of each expert (EPLB), for a contract whose id space is
            ``"physical"``. Of several, the row's number chooses one by a hash, so that the load spreads.
        logical_replica_count: [E] int64; how many replicas each expert has.
        expert_load: [P] int32; the slots of each physical expert are added to it.
        record_load: [] or [1] bool; where it is False, nothing is added.
        num_counted_tokens: [] or [1] int32; rows from it on are not added.
        replay_ids: [T, K] int16; buffer that receives the logical ids, before any map; -1 for padding.
        router_hidden_states: [T, H]; what the router reads where the experts read something else, as in Gemma 4, which
            norms their input alone. For `turnout.moe`; `turnout.route` starts from logits and does not look at it.
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
    record_load: torch.Tensor | None = None
    num_counted_tokens: torch.Tensor | None = None
    replay_ids: torch.Tensor | None = None
    router_hidden_states: torch.Tensor | None = None


class RouterWeights(NamedTuple):
    """The parameters of a router that its `turnout.RouterSpec` names, all of the dtype of the hidden states."""

    proj: torch.Tensor  # [E, H]
    bias: torch.Tensor | None = None  # [E]
    scale: torch.Tensor | None = None  # [H], of the input norm


class Permutation(NamedTuple):
    """The slots of a routing in the order of their experts; fields not asked for are None.

    S = T * K slots; slot ``t * K + k`` is the k-th expert of token t. Slots whose id is no expert (padding, not local)
    have no position: they are counted nowhere. Inside an expert, slots keep their order. Integers are of the contract's
    ``structures_dtype``. Fields have the names, shapes and meaning that they have in `Routing`.

    Example: two tokens choose experts (2, 0) and (2, 1) of three. Then tokens_per_expert is [1, 1, 2], expert_offsets
    [0, 1, 2, 4], permuted_idx [1, 3, 0, 2] and inv_permuted_idx [[2, 0], [3, 1]].
    """

    tokens_per_expert: torch.Tensor | None = None
    expert_offsets: torch.Tensor | None = None
    permuted_idx: torch.Tensor | None = None
    inv_permuted_idx: torch.Tensor | None = None
    sorted_token_ids: torch.Tensor | None = None
    expert_ids: torch.Tensor | None = None
    num_tokens_post_padded: torch.Tensor | None = None
    bitmatrix: torch.Tensor | None = None
    permuted_weights: torch.Tensor | None = None
    block_offsets: torch.Tensor | None = None
    block_schedule: torch.Tensor | None = None


class Routing(NamedTuple):
    """The result of `turnout.route`, in the dtypes of the contract; fields not asked for are None.

    A NamedTuple, and so a pytree. S = T * K slots; slot ``t * K + k`` is the k-th expert of token t. V of them carry
    the id of an expert: all S, unless there is padding or an expert is not local. Integers of the structures are of the
    contract's ``structures_dtype``.
    """

    topk_weights: torch.Tensor  # [T, K] contract.weights_dtype
    topk_ids: torch.Tensor  # [T, K] contract.ids_dtype, in descending order of the ranked value
    tokens_per_expert: torch.Tensor | None = None  # [E], how many slots chose each expert
    expert_offsets: torch.Tensor | None = None  # [E + 1], starts with 0, ends with V
    permuted_idx: torch.Tensor | None = None  # [S], sorted by expert: position -> slot; -1 from V on
    inv_permuted_idx: torch.Tensor | None = None  # [T, K], slot -> position; -1 where the id is no expert
    sorted_token_ids: torch.Tensor | None = None  # [padded S], slots in blocks of one expert each; S fills them up
    expert_ids: torch.Tensor | None = None  # [blocks], the expert of each block; -1 past the last block in use
    num_tokens_post_padded: torch.Tensor | None = None  # [1], how much of sorted_token_ids is used
    bitmatrix: torch.Tensor | None = None  # [T, ceil(E / 32)] uint32, bit e of row t: t chose e
    permuted_weights: torch.Tensor | None = None  # [S] contract.weights_dtype, position -> weight; 0 from V on
    # For blocks of 16, 32, 64, 128 and 256 slots (the rows), each of one expert:
    block_offsets: torch.Tensor | None = None  # [5, E + 1], how many blocks come before each expert
    block_schedule: torch.Tensor | None = None  # [5, blocks], block -> expert | number of it in its expert << 16; or -1

    @property
    def permutation(self) -> Permutation:
        """The structures alone."""
        return Permutation(*self[2:])


class ExpertsWeights(NamedTuple):
    """The parameters of E experts, in the layout that `turnout.ExpertsSpec` states.

    I intermediate size, H hidden size. Plain weights are float32, bfloat16 or float16; for those of a quantised
    scheme, and for the scales, see ``ExpertsSpec.quantization``.
    """

    gate_up_proj: torch.Tensor  # [E, 2I, H], gate rows before up rows; transposed: [E, H, 2I]
    down_proj: torch.Tensor  # [E, H, I]; transposed: [E, I, H]
    gate_up_bias: torch.Tensor | None = None  # [E, 2I]
    down_bias: torch.Tensor | None = None  # [E, H]
    gate_up_scale: torch.Tensor | None = None  # [E, 2I, groups]
    down_scale: torch.Tensor | None = None  # [E, H, groups]
