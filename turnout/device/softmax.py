"""Softmax on a tile of rows, in the order of additions that the references use."""

import triton
import triton.language as tl


@triton.jit
def unnormalized_softmax(values, best):
    """``exp(values - best)``, and 1 where they are equal: also for infinities, which then share alike."""
    return tl.where(values == best, 1.0, tl.exp(values - best))


@triton.jit
def tree_sum(values, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of each row by halves: [ROWS, WIDTH] -> [ROWS, 1].

    Each step adds two numbers, so the rounding does not depend on how the compiler spreads the tile over
    threads, and with it not on the tile's shape.
    """
    if WIDTH > 1:
        halves = tl.reshape(values, (ROWS, 2, WIDTH // 2))
        return tree_sum(tl.sum(halves, axis=1), ROWS, WIDTH // 2)
    else:
        return values
