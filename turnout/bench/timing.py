"""Timing of GPU work by CUDA-graph replay, variants interleaved."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Microseconds of one call: median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float


def capture(call: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of ``call(0) ... call(calls - 1)``, warmed up before (kernels compile, caches fill)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(calls, 3)):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.instantiate()
    return graph


def launches(call: Callable[[int], object]) -> int | None:
    """Kernels, fills and copies of one call, counted as the nodes of its graph; None where no CUDA driver counts."""
    if torch.version.cuda is None:
        return None
    graph, count = capture(call, 1), ctypes.c_size_t()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(handle, None, ctypes.byref(count))
    if status != 0:
        raise RuntimeError(f"the CUDA driver cannot count the nodes of a graph: error {status}")
    return count.value


def graph_times(
    variants: Mapping[str, Callable[[int], object]], *, calls: int = 100, rounds: int = 30
) -> dict[str, Timing]:
    """Time of one call of each variant, in microseconds.

    Each variant is captured as a graph of ``calls`` calls; ``call(i)`` should take its i-th input, so that
    inputs can rotate past the cache. Every round replays each variant once, so that drift hits all alike.
    """
    graphs = {name: capture(call, calls) for name, call in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: summary(times[2:]) for name, times in samples.items()}  # two rounds to warm up


def summary(samples: list[float]) -> Timing:
    """Median and quartiles."""
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Timing(median, lower, upper)
