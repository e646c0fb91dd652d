"""What a device can do at most, measured: bytes read and floating-point operations per microsecond."""

from __future__ import annotations

from typing import NamedTuple

import torch

from turnout.bench.timing import graph_times

READ_BYTES = 4 << 30  # many times any cache
PROGRAMS = (1 << 12, 1 << 14, 1 << 16, 1 << 18)
MATMUL_SIZE = 8192


class Ceilings(NamedTuple):
    """Rates of a device: bytes read per microsecond, and operations of a large matrix product per microsecond."""

    bytes_per_us: float
    flops_per_us: float

    def floor(self, moved: float, operations: float) -> tuple[float, str]:
        """The fewest microseconds in which so many bytes and operations can be done, and which of them takes that."""
        read, multiply = moved / self.bytes_per_us, operations / self.flops_per_us
        return (read, "read") if read >= multiply else (multiply, "matmul")


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Both rates of a device, with random data: matrix products run faster on zeros."""
    return Ceilings(_read_rate(device), _matmul_rate(dtype, device))


def _read_rate(device: torch.device) -> float:
    """The best of several ways to share the reading out."""
    from turnout.bench.triton import read

    source = torch.randint(-(1 << 30), 1 << 30, (READ_BYTES // 4,), dtype=torch.int32, device=device)
    sums = {programs: torch.empty(programs, dtype=torch.int32, device=device) for programs in PROGRAMS}
    ways = {
        f"{programs} programs of {warps} warps": lambda i, programs=programs, warps=warps: read(
            source, sums[programs], warps
        )
        for programs in PROGRAMS
        for warps in (4, 8)
    }
    times = graph_times(ways, calls=2, rounds=7)
    return READ_BYTES / min(timing.median for timing in times.values())


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    timing = graph_times({"matmul": lambda i: torch.mm(left, right, out=out)}, calls=4, rounds=9)["matmul"]
    return 2 * MATMUL_SIZE**3 / timing.median
