"""``turnout.combine``: what goes in, what is checked, which implementation runs."""

from __future__ import annotations

import torch

from turnout.combine import ops as _ops  # registers the operators
from turnout.contracts import STRUCTURES_DTYPES, WEIGHTS_DTYPES
from turnout.impls import FLOAT_DTYPES, Choice, check_grad, check_impl, check_kind, check_tensor

IMPLS = ("reference", "triton", "cpu")


def combine(
    expert_out: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Sum the K expert outputs of each token, each times its weight.

    One launch on a GPU, one pass over each row on a CPU. Products and sums are in float32, in the order k = 0 .. K-1,
    and rounded once, to the dtype of ``expert_out``. A slot of weight exactly 0, or of index -1, contributes
    nothing, whatever lies in its row. A row does not depend on the other rows.

    Args:
        expert_out: float32, bfloat16 or float16. Without ``inv_permuted_idx`` [S, H] or [T, K, H] in the order of
            slots; with it [rows, H] in any order. Rows may lie apart.
        topk_weights: [T, K] float32, bfloat16 or float16; T may be 0.
        inv_permuted_idx: [T, K] int32 or int64: the row of ``expert_out`` that holds each slot; negative: none.
        out: [T, H] of the dtype of ``expert_out``, contiguous, to write into.
        impl: ``"auto"``, or one of ``"reference"``, ``"triton"``, ``"cpu"``; a named one runs or raises.

    Returns:
        [T, H] of the dtype of ``expert_out``.

    Raises:
        ValueError: an argument does not fit the others; the message says what was given and what is wanted.
        TypeError: an argument is not of its type.
    """
    check_kind("expert_out", expert_out, torch.Tensor)
    check_tensor("topk_weights", topk_weights, (None, None), WEIGHTS_DTYPES, ("expert_out", expert_out))
    rows = _rows_of(expert_out, topk_weights, inv_permuted_idx is not None)
    if inv_permuted_idx is not None:
        shape = tuple(topk_weights.shape)
        check_tensor("inv_permuted_idx", inv_permuted_idx, shape, STRUCTURES_DTYPES, ("expert_out", expert_out))
    if impl == "auto":
        impl = choose_impl(expert_out).impl
    else:
        check_impl(impl, IMPLS)
    if out is None:
        return _ops.combine(rows, topk_weights, inv_permuted_idx, impl)
    shape = (topk_weights.shape[0], rows.shape[1])
    check_tensor("out", out, shape, (expert_out.dtype,), ("expert_out", expert_out))
    _ops.combine_out(rows, topk_weights, inv_permuted_idx, impl, out=out)
    return out


def choose_impl(tensor: torch.Tensor) -> Choice:
    """The implementation that ``impl="auto"`` takes where ``tensor`` lies, and the reason."""
    if tensor.is_cpu:
        return Choice("cpu", "outputs on a CPU: one pass over each row")
    if tensor.is_cuda or tensor.is_xpu:  # "cuda" is what torch calls ROCm devices, too
        return Choice("triton", "outputs on a GPU: one launch")
    return Choice("reference", f"no kernel for device type {tensor.device.type!r}: plain torch operations")


def _rows_of(expert_out: torch.Tensor, topk_weights: torch.Tensor, indexed: bool) -> torch.Tensor:
    """``expert_out`` as [rows, H], without a copy."""
    num_tokens, top_k = topk_weights.shape
    if expert_out.dtype not in FLOAT_DTYPES:
        raise ValueError(f"expert_out must be float32, bfloat16 or float16, got {expert_out.dtype}")
    check_grad("expert_out", expert_out)
    if expert_out.dim() == 3 and not indexed:
        if tuple(expert_out.shape[:2]) != (num_tokens, top_k):
            raise ValueError(
                f"expert_out is {list(expert_out.shape)}, topk_weights {list(topk_weights.shape)}; "
                "expert_out [T, K, H] must have its T and K"
            )
        if not expert_out.is_contiguous():
            raise ValueError(
                f"expert_out [T, K, H] must be contiguous, got strides {expert_out.stride()}; pass "
                "expert_out.contiguous() if the copy is meant"
            )
        return expert_out.view(num_tokens * top_k, expert_out.shape[2])
    if expert_out.dim() != 2:
        wanted = "[rows, H] beside inv_permuted_idx" if indexed else "[T * K, H] or [T, K, H]"
        raise ValueError(f"expert_out must be {wanted}, got shape {list(expert_out.shape)}")
    if not indexed and expert_out.shape[0] != num_tokens * top_k:
        raise ValueError(
            f"expert_out has {expert_out.shape[0]} rows, topk_weights {list(topk_weights.shape)} makes "
            f"{num_tokens * top_k} slots; outputs in another order need inv_permuted_idx"
        )
    if expert_out.stride(1) != 1 and expert_out.shape[1] > 1:
        raise ValueError(
            f"expert_out must have contiguous rows, got strides {expert_out.stride()}; rows may lie apart, columns "
            "may not: pass expert_out.contiguous() if the copy is meant"
        )
    return expert_out
