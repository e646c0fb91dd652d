"""What one call asks of the device, counted by torch.profiler, which also sees inside custom operators."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from turnout.machine import profiler_activities


class Kernel(NamedTuple):
    """What a device ran under one name in a call: how often, and for how many microseconds together."""

    name: str
    times: float
    us: float


# The runtime calls of CUDA and HIP; Level Zero has no graphs that torch replays.
_GRAPH_LAUNCH = re.compile("(cuda|hip)GraphLaunch")


_INTEGER_WORDS = {"signed", "unsigned", "char", "short", "int", "long"}  # the profiler names dtypes as C++ does


class Counts(NamedTuple):
    """Copies and launches of one call.

    A copy that `torch.compile` fused into a generated kernel, or that a device graph replays, is no call of
    ``aten::copy_`` and not counted.
    """

    copies: int  # calls of aten::copy_
    copy_share: float  # their share of the device time, 0 to 1; of the time in operators on a CPU
    launches: int  # kernels and memory operations; on a CPU: operators, those inside other operators left out
    device_ms: float = 0.0  # the device time: of all launches; of all operators on a CPU
    graphs: int = 0  # device graphs replayed; what they launch is counted above


def count(call: Callable[[], object], device: torch.device) -> Counts:
    """Profile one call; warm it up before.

    Args:
        call: what to count.
        device: where it computes; a CPU, or an accelerator that torch.profiler can follow.
    """
    events = _events(call, device)
    copies = [event for event in events if event.name == "aten::copy_"]
    if device.type == "cpu":
        copy_us = sum(event.self_cpu_time_total for event in copies)
        device_us = sum(event.self_cpu_time_total for event in events)
        launches = sum(_is_operator(event) and not _is_inside_operator(event) for event in events)
    else:
        launched = [event for event in events if _is_launch(event)]
        copy_us = sum(kernel.duration for event in copies for kernel in event.kernels)
        device_us = sum(event.time_range.elapsed_us() for event in launched)
        launches = len(launched)
    graphs = sum(_GRAPH_LAUNCH.match(event.name) is not None for event in events)
    return Counts(len(copies), copy_us / device_us if device_us else 0.0, launches, device_us / 1e3, graphs)


def kernels(call: Callable[[int], object], device: torch.device, calls: int = 4) -> list[Kernel]:
    """Each kernel and memory operation of a call, in the order of their first launch; warm the call up before.

    Args:
        call: ``call(i)`` takes the i-th input.
        device: an accelerator that torch.profiler can follow.
        calls: how many are profiled; what comes back is the mean of one.
    """
    found: dict[str, list[float]] = {}
    events = _events(lambda: [call(i) for i in range(calls)], device)
    for event in sorted(filter(_is_launch, events), key=lambda event: event.time_range.start):
        found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return [Kernel(name, len(times) / calls, sum(times) / calls) for name, times in found.items()]


def ids_casts(call: Callable[[], object], device: torch.device, shape: tuple[int, int]) -> int:
    """How many tensors of ids a call converts from one integer dtype to another; warm it up before.

    Args:
        call: what to count; what a device graph replays is not seen.
        device: where it computes.
        shape: of the ids, [T, K]: other integers are not counted.
    """
    profile = _profiled(call, device, record_shapes=True)
    copies = [event for event in profile.profiler.kineto_results.events() if event.name() == "aten::copy_"]
    return sum(_converts_integers(event.dtypes()[:2]) and event.shapes()[0] == list(shape) for event in copies)


def copies_inside(call: Callable[[], object], device: torch.device, module: torch.nn.Module) -> int:
    """Calls of ``aten::copy_`` from a module's start to its end; warm the call up before."""
    name = "turnout: inside a module"
    entered: list[Any] = []

    def enter(*_: object) -> None:
        entered.append(torch.profiler.record_function(name).__enter__())

    def leave(*_: object) -> None:
        entered.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        events = _events(call, device)
    finally:
        for hook in hooks:
            hook.remove()
    spans = [event.time_range for event in events if event.name == name and event.device_type.name == "CPU"]
    starts = [event.time_range.start for event in events if event.name == "aten::copy_"]
    return sum(any(span.start <= start <= span.end for span in spans) for start in starts)


def _converts_integers(dtypes: list[str]) -> bool:
    return dtypes[0] != dtypes[1] and all(set(dtype.split()) <= _INTEGER_WORDS for dtype in dtypes)


def _events(call: Callable[[], object], device: torch.device) -> list[Any]:
    return list(_profiled(call, device).events() or ())


def _profiled(call: Callable[[], object], device: torch.device, *, record_shapes: bool = False) -> Any:
    profile = torch.profiler.profile(activities=profiler_activities(device.type), record_shapes=record_shapes)
    with _no_kineto_log():
        profile.start()
    try:
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    finally:
        with _no_kineto_log():
            profile.stop()
    return profile


@contextlib.contextmanager
def _no_kineto_log() -> Iterator[None]:
    """Keep a terminal clean: torch 2.13 logs a line at each start and stop, which no log level turns off."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _is_operator(event: Any) -> bool:
    """Operators are named ``namespace::name``; what else the CPU's timeline holds (regions of compiled code) is not."""
    return "::" in event.name and " " not in event.name


def _is_inside_operator(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None and not _is_operator(parent):
        parent = parent.cpu_parent
    return parent is not None


def _is_launch(event: Any) -> bool:
    """Whether the device ran it; ranges that annotate the code are mirrored on the device's timeline too."""
    return event.device_type.name != "CPU" and not event.is_user_annotation
