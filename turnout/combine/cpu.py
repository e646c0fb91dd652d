"""Combine on a CPU: one pass over each row, threads for many rows.

The kernel works on addresses, so that it reads and writes every dtype in place, and a call makes no arrays. numba is
imported at the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from turnout.contracts import dtype_name
from turnout.threads import in_threads

# Tokens are shared out among threads from this many numbers on: below, waking a thread costs more than it saves.
NUMBERS_PER_THREAD = 1 << 17
WEIGHTS_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # codes of the dtypes of topk_weights


def launch(
    expert_out: torch.Tensor, topk_weights: torch.Tensor, inv_permuted_idx: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Combine ``expert_out`` [rows, H] into ``out`` [T, H], on as many of torch's threads as it is worth."""
    if not expert_out.is_cpu:
        raise ValueError(
            f"impl='cpu' needs expert_out on a CPU, got {expert_out.device}; use impl='triton' or impl='auto'"
        )
    num_tokens, top_k = topk_weights.shape
    hidden_size = out.shape[1]
    run = functools.partial(
        _kernel(), like_of(expert_out.dtype), expert_out.data_ptr(), expert_out.stride(0),
        topk_weights.data_ptr(), WEIGHTS_CODE[topk_weights.dtype], top_k,
        0 if inv_permuted_idx is None else inv_permuted_idx.data_ptr(),
        0 if inv_permuted_idx is None else inv_permuted_idx.element_size(),
        out.data_ptr(), hidden_size,
    )  # fmt: skip
    numbers = num_tokens * top_k * hidden_size
    in_threads(run, num_tokens, min(torch.get_num_threads(), numbers // NUMBERS_PER_THREAD))


@functools.cache
def like_of(dtype: torch.dtype) -> Any:
    """What tells kernels the dtype of the floats at their addresses."""
    from turnout.combine._cpu_kernel import LIKE

    return LIKE[dtype_name(dtype)]


@functools.cache
def _kernel() -> Callable[..., Any]:
    from turnout.combine._cpu_kernel import combine_rows

    return combine_rows
