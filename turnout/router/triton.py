"""The router of few tokens: norm, scale and projection in one Triton launch, that reads each weight once a token.

A GEMM of one row and a hundred columns keeps few processors busy, so cuBLAS splits its sums in two launches. Here each
program computes one logit, in an order that only the sizes decide: a row's bits do not depend on its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turnout.device.launch import launch_kernel, on_device_of, refuse_cpu
from turnout.device.rounding import narrowed, round_to, widened

MAX_COLUMNS = 4096  # that a program holds at a time


@triton.jit
def _project_kernel(
    hidden_ptr,  # [T, H], rows HIDDEN_STRIDE apart
    proj_ptr,  # [E, H]
    bias_ptr,  # [E] or None
    scale_ptr,  # [H] or None: no norm
    logits_ptr,  # [T, E]
    HIDDEN_STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EPS: tl.constexpr,
    ROOT_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (E, T). Each program computes the logit of one expert for one token."""
    expert = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    hidden_ptr += token * HIDDEN_STRIDE
    proj_ptr += expert * HIDDEN
    DTYPE: tl.constexpr = hidden_ptr.dtype.element_ty
    factor = 1.0
    if scale_ptr is not None:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, HIDDEN, BLOCK):
            h = start + tl.arange(0, BLOCK)
            values = widened(tl.load(hidden_ptr + h, mask=h < HIDDEN, other=0.0))
            squares += values * values
        factor = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / HIDDEN + EPS)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        h = start + tl.arange(0, BLOCK)
        weights = widened(tl.load(proj_ptr + h, mask=h < HIDDEN, other=0.0))
        values = widened(tl.load(hidden_ptr + h, mask=h < HIDDEN, other=0.0))
        if scale_ptr is not None:  # rounded after each step, as the model does
            scale = widened(tl.load(scale_ptr + h, mask=h < HIDDEN, other=0.0))
            values = round_to(round_to(round_to(values * factor, DTYPE) * scale, DTYPE) * ROOT_SIZE, DTYPE)
        products += weights * values
    logit = tl.sum(products, axis=0)
    if bias_ptr is not None:
        logit += widened(tl.load(bias_ptr + expert))
    tl.store(logits_ptr + token * NUM_EXPERTS + expert, narrowed(logit, logits_ptr.dtype.element_ty))


def launch(
    hidden_states: torch.Tensor,
    proj: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    logits: torch.Tensor,
) -> None:
    """The logits, [T, E], with one launch."""
    refuse_cpu(_project_kernel, hidden_states, "tokens", instead="reference")
    num_tokens, hidden_size = hidden_states.shape
    if num_tokens == 0:
        return
    stride = hidden_states.stride(0) if num_tokens > 1 else 0  # of one row it may be anything
    block = min(MAX_COLUMNS, triton.next_power_of_2(hidden_size))
    with on_device_of(hidden_states):
        launch_kernel(
            _project_kernel,
            (len(proj), num_tokens, 1),
            (hidden_states, proj, bias, scale, logits),
            (),
            (stride, hidden_size, len(proj), eps, hidden_size**-0.5, block),
            num_warps=4,
        )
