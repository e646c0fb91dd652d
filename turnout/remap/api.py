"""Remap: what goes in, what is checked, which implementation runs.

`remap_hidden_states` is the counterpart of the operator of that name in vllm-xpu-kernels, and `remapped_experts` of
the grouped GEMMs that follow it there; ``turnout.combine`` is the gather at the end. The consumer's own names are in
``turnout.integrations.vllm_xpu_kernels``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from turnout.device import MAX_KERNEL_EXPERTS
from turnout.experts.api import check_weights
from turnout.impls import Choice, check_grad, check_impl, check_kind, check_tensor
from turnout.remap import ops as _ops  # registers the operators
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights

IMPLS = ("reference", "triton", "cpu")
IDS_DTYPES = (torch.int32, torch.int64)
HIDDEN_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float4_e2m1fn_x2,
)  # fmt: skip
SCALES_DTYPES = (torch.float32, torch.float8_e8m0fnu)
GEMM_DTYPES = HIDDEN_DTYPES[:3]
_MAX_SLOTS = 2**31 - 1  # positions are int32


class Remapped(NamedTuple):
    """The rows of hidden states in the order of their experts, and where each slot went.

    S = T * K slots; slot ``t * K + k`` is the k-th expert of token t. V of them are of an expert of this rank.

    Example: two tokens a, b choose experts (2, 0) and (2, 1) of three. Then the rows are [a, b, a, b],
    tokens_per_expert is [1, 1, 2] and inv_permuted_idx [[2, 0], [3, 1]].
    """

    hidden_states: torch.Tensor  # [S, H], expert by expert, inside an expert token by token; zeros from V on
    tokens_per_expert: torch.Tensor  # [E] int32, how many rows each expert has
    inv_permuted_idx: torch.Tensor  # [T, K] int32, slot -> row; -1 where the slot was skipped
    scales: torch.Tensor | None = None  # [S, G], the scales of each row


def remap_hidden_states(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    *,
    expert_map: torch.Tensor | None = None,
    hidden_states_scales: torch.Tensor | None = None,
    out: Remapped | None = None,
    impl: str = "auto",
) -> Remapped:
    """Copy the row of each token to each of the K experts that it chose, so that the rows of one expert lie together.

    At most three launches on a GPU. Rows are copied bit by bit. The order is by expert, then by token: the same at
    every run. A slot is skipped whose id is outside of the experts or, with a map, outside of the map or mapped to
    no expert of this rank (-1, or any other number outside of [0, E)). Every element of the results is written.

    Args:
        hidden_states: [T, H] float32, bfloat16, float16, float8_e4m3fn or float4_e2m1fn_x2 (two values a byte);
            rows may be strided, T may be 0.
        topk_ids: [T, K] int32 or int64, contiguous; any K.
        num_experts: E, the experts of this rank.
        expert_map: [experts of all ranks] int32; global id to expert of this rank, -1 where it has none. None: the
            ids are this rank's.
        hidden_states_scales: [T, G] float32 or float8_e8m0fnu; rows may be strided. Copied as the rows are.
        out: contiguous buffers to write into, not zeroed: a `Remapped` with scales where there are scales.
        impl: ``"auto"``, or one of ``"reference"``, ``"triton"``, ``"cpu"``; a named one runs or raises.

    Returns:
        `Remapped`; the buffers of ``out``, if given.

    Raises:
        ValueError: an argument does not fit the others; the message says what was given and what is wanted.
        TypeError: an argument is not of its type.
    """
    _check_rows("hidden_states", hidden_states, HIDDEN_DTYPES)
    _check_slots(hidden_states, topk_ids, num_experts, expert_map)
    if hidden_states_scales is not None:
        _check_scales(hidden_states, hidden_states_scales)
    if impl == "auto":
        impl = choose_impl(hidden_states, num_experts).impl
    else:
        check_impl(impl, IMPLS)
    arguments = (hidden_states, topk_ids, num_experts, impl, expert_map, hidden_states_scales)
    if out is None:
        rows, tokens_per_expert, inv_permuted_idx, scales = _ops.remap(*arguments)
        return Remapped(
            rows, tokens_per_expert, inv_permuted_idx, None if hidden_states_scales is None else scales
        )  # fmt: skip
    _check_out(out, hidden_states, topk_ids, num_experts, hidden_states_scales)
    rows, tokens_per_expert, inv_permuted_idx, out_scales = out
    _ops.remap_out(
        *arguments, rows=rows, tokens_per_expert=tokens_per_expert, inv_permuted_idx=inv_permuted_idx, scales=out_scales
    )
    return out


def remapped_experts(
    rows: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    weights: ExpertsWeights,
    spec: ExpertsSpec,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Run each expert on its rows, as `remap_hidden_states` laid them together.

    Two launches on a GPU: the gate_up GEMM with its activation, and the down GEMM. The activation is rounded to the
    dtype of the rows; sums are in float32.

    Args:
        rows: [S, H] float32, bfloat16 or float16, contiguous, expert by expert.
        tokens_per_expert: [E] int32, how many rows each expert has.
        weights: in the layout that ``spec`` states, in the dtype of the rows.
        spec: what the experts compute; not quantised.
        impl: as in `remap_hidden_states`.

    Returns:
        [S, H], each row's output. Rows that belong to no expert hold anything: `turnout.combine` does not read them.

    Raises:
        ValueError: an argument does not fit the others; the message says what was given and what is wanted.
        TypeError: an argument is not of its type.
        NotImplementedError: the weights are quantised.
    """
    check_kind("weights", weights, ExpertsWeights)
    check_kind("spec", spec, ExpertsSpec)
    if spec.quantization != "none":
        raise NotImplementedError(
            f"remapped_experts does not run quantization={spec.quantization!r} (ExpertsSpec.quantization); "
            "turnout.experts runs quantised weights"
        )
    check_tensor("rows", rows, (None, None), GEMM_DTYPES, ("rows", rows))
    check_weights(rows, weights, spec)
    num_experts = weights.gate_up_proj.shape[0]
    check_tensor("tokens_per_expert", tokens_per_expert, (num_experts,), (torch.int32,), ("rows", rows))
    if impl == "auto":
        impl = choose_impl(rows, num_experts).impl
    else:
        check_impl(impl, IMPLS)
    return _ops.remapped_experts(rows, tokens_per_expert, spec.key, impl, *weights[:4])


def choose_impl(tensor: torch.Tensor, num_experts: int) -> Choice:
    """The implementation that ``impl="auto"`` takes for rows where ``tensor`` lies, and the reason."""
    if tensor.is_cpu:
        return Choice("cpu", "rows on a CPU: torch's own copies and GEMMs")
    if not (tensor.is_cuda or tensor.is_xpu):  # "cuda" is what torch calls ROCm devices, too
        return Choice("reference", f"no kernel for device type {tensor.device.type!r}: plain torch operations")
    if num_experts > MAX_KERNEL_EXPERTS:
        return Choice("reference", f"more than {MAX_KERNEL_EXPERTS} experts: plain torch operations")
    return Choice("triton", "rows on a GPU: three launches to remap, two for the experts")


def _check_rows(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse what is not [T, any] of these dtypes with contiguous rows."""
    check_kind(name, tensor, torch.Tensor)
    if tensor.dim() != 2 or tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} must be [T, columns] of {' or '.join(map(str, dtypes))}, "
            f"got {list(tensor.shape)} of {tensor.dtype}"
        )
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ValueError(
            f"{name} must have contiguous rows, got strides {tensor.stride()}; rows may lie apart, columns may not: "
            f"pass {name}.contiguous() if the copy is meant"
        )
    check_grad(name, tensor)


def _check_scales(hidden_states: torch.Tensor, scales: torch.Tensor) -> None:
    _check_rows("hidden_states_scales", scales, SCALES_DTYPES)
    if scales.shape[0] != hidden_states.shape[0] or scales.device != hidden_states.device:
        raise ValueError(
            f"hidden_states_scales has {scales.shape[0]} rows on {scales.device}, hidden_states "
            f"{hidden_states.shape[0]} on {hidden_states.device}; each row has its scales beside it"
        )


def _check_slots(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> None:
    num_tokens = hidden_states.shape[0]
    check_tensor("topk_ids", topk_ids, (num_tokens, None), IDS_DTYPES, ("hidden_states", hidden_states))
    top_k = topk_ids.shape[1]
    if top_k < 1:
        raise ValueError("topk_ids must be [T, K] with K at least 1, got K = 0")
    if num_tokens * top_k > _MAX_SLOTS:
        raise ValueError(
            f"topk_ids has {num_tokens} * {top_k} slots, and positions are int32: at most {_MAX_SLOTS} in one call; "
            "split the tokens"
        )
    if type(num_experts) is not int or num_experts < 1:
        raise ValueError(f"num_experts must be an int of at least 1, got {num_experts!r}")
    if expert_map is not None:
        check_tensor("expert_map", expert_map, (None,), (torch.int32,), ("hidden_states", hidden_states))
        if len(expert_map) == 0:
            raise ValueError("expert_map must have an entry for each expert of all ranks, got none")


def _check_out(
    out: Remapped,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    scales: torch.Tensor | None,
) -> None:
    if not isinstance(out, Remapped):
        raise TypeError(f"out must be a Remapped, got {type(out).__name__}")
    beside, shape = ("hidden_states", hidden_states), tuple(topk_ids.shape)
    slots = shape[0] * shape[1]
    check_tensor(
        "out.hidden_states", out.hidden_states, (slots, hidden_states.shape[1]), (hidden_states.dtype,), beside
    )
    check_tensor("out.tokens_per_expert", out.tokens_per_expert, (num_experts,), (torch.int32,), beside)
    check_tensor("out.inv_permuted_idx", out.inv_permuted_idx, shape, (torch.int32,), beside)
    if scales is not None and out.scales is not None:
        check_tensor("out.scales", out.scales, (slots, scales.shape[1]), (scales.dtype,), beside)
    elif scales is not out.scales:
        raise ValueError(
            f"hidden_states_scales is {'missing' if scales is None else 'given'}, but out.scales is "
            f"{'missing' if out.scales is None else 'given'}; both or neither"
        )
