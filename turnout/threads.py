"""Work of CPU kernels that release the GIL, shared out among threads."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def in_threads(run: Callable[[int, int], object], count: int, threads: int) -> None:
    """Call ``run(start, end)`` for shares that make up range(count), the first one in the caller's own thread.

    All shares have ended when this does, also by an exception: the caller may then free what they write to.
    """
    if threads <= 1 or count <= 1:
        run(0, count)
        return
    step = math.ceil(count / threads)
    shares = [(start, min(start + step, count)) for start in range(0, count, step)]
    others = [_pool().submit(run, *share) for share in shares[1:]]
    try:
        run(*shares[0])
    finally:
        errors = [other.exception() for other in others]  # waits for each
    for error in errors:
        if error is not None:
            raise error


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """One for every number of shares: it starts a thread where none is idle."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="turnout")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of the pool's threads
