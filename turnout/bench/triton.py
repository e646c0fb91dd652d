"""A kernel that does nothing but read, to measure how fast a device can."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WORDS = 2048  # int32, that a program reads at a time


@triton.jit
def _read_kernel(source_ptr, sums_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (N / (STEPS * BLOCK),). Each program reads its share of N words and writes one sum."""
    program = tl.program_id(0).to(tl.int64)
    pointers = source_ptr + program * (STEPS * BLOCK) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for _ in range(STEPS):
        total += tl.load(pointers)
        pointers += BLOCK
    tl.store(sums_ptr + program, tl.sum(total, axis=0))


def read(source: torch.Tensor, sums: torch.Tensor, num_warps: int) -> None:
    """Read all of ``source`` once.

    Args:
        source: [N] int32.
        sums: [P] int32; P programs share the reading, and N must be a multiple of P * `WORDS`.
        num_warps: of a program.
    """
    steps, rest = divmod(source.numel(), sums.numel() * WORDS)
    if rest:
        raise ValueError(
            f"{source.numel()} words are not shared evenly by {sums.numel()} programs of {WORDS} at a time"
        )
    _read_kernel[(sums.numel(),)](source, sums, steps, WORDS, num_warps=num_warps)
