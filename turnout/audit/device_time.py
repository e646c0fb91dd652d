"""What copies cost on the device, measured with torch.profiler, which also sees inside custom operators."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler import record_function

from turnout.audit.modules import ModuleStack
from turnout.audit.regions import fold
from turnout.machine import profiler_activities

_RANGE = "turnout.audit:"
_COPY_OPS = ("aten::copy_", "aten::_to_copy", "aten::clone")
# How runtimes and PyTorch's own kernels name a copy, for kernels that no operator claims.
_COPY_KERNEL = re.compile(r"copy_kernel|direct_copy|memcpy (dtod|htod|dtoh)|copyBuffer|bfloat16tofloat", re.IGNORECASE)
_GRAPH_LAUNCH = re.compile(r"^(cuda|hip)GraphLaunch|^zeCommandListImmediateAppendCommandLists", re.IGNORECASE)
_COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph")


@dataclass(frozen=True, slots=True)
class ModuleTime:
    """Copies issued by one module, layers folded.

    Attributes:
        module: dotted path with ``*`` for layer numbers; "" outside any.
        inside: the custom operator that made them, "" for copies in plain sight.
        calls: `aten::copy_` calls per call of the program.
        us: microseconds of device time per call of the program.
    """

    module: str
    inside: str
    calls: float
    us: float


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """Device time of one phase, per call of the program.

    Attributes:
        copy_calls, to_copy_calls: `aten::copy_` and `aten::_to_copy` operators.
        copy_kernels: kernels and memory transfers that copy; 0 on the CPU, which has none.
        copy_us: microseconds of device time in copies.
        device_us: microseconds of device time in all.
    """

    name: str
    calls: int
    copy_calls: float
    to_copy_calls: float
    copy_kernels: float
    copy_us: float
    device_us: float
    modules: tuple[ModuleTime, ...]

    @property
    def share(self) -> float:
        """Copies' share of device time, from 0 to 1."""
        return self.copy_us / self.device_us if self.device_us else 0.0


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """Device-time side of an audit.

    Attributes:
        device: "cpu" (then device time is CPU time inside operators), "cuda" or another accelerator.
        phases: one row per phase.
        notes: what the profiler could not attribute, one sentence each.
    """

    device: str
    phases: tuple[PhaseTime, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DeviceTime:
        """Device time from its JSON form."""
        phases = tuple(
            PhaseTime(**{**phase, "modules": tuple(ModuleTime(**row) for row in phase["modules"])})
            for phase in data["phases"]
        )
        return cls(data["device"], phases, tuple(data["notes"]))


@dataclass(slots=True)
class _Tally:
    """Sums over one profile."""

    operators: Counter[str] = field(default_factory=Counter)
    by_module: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    copy_kernels: int = 0
    copy_us: float = 0.0
    device_us: float = 0.0
    graph_launches: int = 0
    unclaimed_copies: int = 0
    compiled_regions: int = 0


def measure(phases: dict[str, list[Callable[[], Any]]], root: torch.nn.Module | None, device: str) -> DeviceTime:
    """Profile the calls of each phase.

    Args:
        phases: name to the calls to make, in order. They run as they are: warm up and compile before.
        root: the audited module, for its names; None for a function.
        device: "cpu" or an accelerator's device type, such as "cuda".

    Raises:
        ValueError: torch.profiler knows no such device type.
    """
    rows: list[PhaseTime] = []
    notes: list[str] = []
    for name, calls in phases.items():
        tally = _profile(calls, root, device)
        rows.append(_row(name, len(calls), tally))
        notes += _notes(name, tally)
    return DeviceTime(device, tuple(rows), tuple(dict.fromkeys(notes)))


def _profile(calls: list[Callable[[], Any]], root: torch.nn.Module | None, device: str) -> _Tally:
    with _RangesPerModule(root), torch.profiler.profile(activities=profiler_activities(device)) as profile:
        for call in calls:
            call()
        if device != "cpu":
            torch.accelerator.synchronize()
    return _tally(list(profile.events() or ()), device)


class _RangesPerModule(ModuleStack):
    """Marks each module's call in the profile."""

    def __init__(self, root: torch.nn.Module | None) -> None:
        super().__init__(root)
        self._ranges: list[record_function] = []

    def _push(self, module: torch.nn.Module, args: Any) -> None:
        super()._push(module, args)
        entered = record_function(_RANGE + self.current)
        entered.__enter__()
        self._ranges.append(entered)

    def _pop(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._ranges:
            self._ranges.pop().__exit__(None, None, None)
        super()._pop(module, args, output)


def _tally(events: list[Any], device: str) -> _Tally:
    tally = _Tally()
    of_copies = [kernel.name for event in events if event.name in _COPY_OPS for kernel in event.kernels]
    names = set(of_copies)
    for event in events:
        if event.device_type == DeviceType.CPU:
            _count_operator(tally, event, device)
        elif not _is_range(event):
            _count_kernel(tally, event, names)
    tally.unclaimed_copies = max(0, tally.copy_kernels - len(of_copies))
    return tally


def _count_operator(tally: _Tally, event: Any, device: str) -> None:
    tally.graph_launches += bool(_GRAPH_LAUNCH.match(event.name))
    tally.compiled_regions += event.name.startswith(_COMPILED)
    own_us = event.self_cpu_time_total if device == "cpu" else 0.0
    if not event.name.startswith(_RANGE):
        tally.device_us += own_us
    if event.name not in _COPY_OPS:
        return
    tally.operators[event.name] += 1
    tally.copy_us += own_us
    row = tally.by_module[_where(event)]
    row[0] += event.name == "aten::copy_"
    row[1] += own_us if device == "cpu" else sum(kernel.duration for kernel in event.kernels)


def _is_range(event: Any) -> bool:
    """A module's range is mirrored on the device's timeline; it is no kernel."""
    return event.name.startswith((_RANGE, *_COMPILED)) or bool(getattr(event, "is_user_annotation", False))


def _count_kernel(tally: _Tally, event: Any, of_copies: set[str]) -> None:
    us = event.time_range.elapsed_us()
    tally.device_us += us
    if event.name in of_copies or _COPY_KERNEL.search(event.name):
        tally.copy_kernels += 1
        tally.copy_us += us


def _where(event: Any) -> tuple[str, str]:
    """The module whose range an event lies in, and the outermost custom operator between."""
    inside, parent = "", event.cpu_parent
    while parent is not None:
        if parent.name.startswith(_RANGE):
            return fold(parent.name.removeprefix(_RANGE)), inside
        space = parent.name.partition("::")[0]
        if "::" in parent.name and space not in ("aten", "prims", "profiler") and " " not in parent.name:
            inside = parent.name
        parent = parent.cpu_parent
    return "", inside


def _row(name: str, calls: int, tally: _Tally) -> PhaseTime:
    per_call = 1 / max(calls, 1)
    modules = tuple(
        ModuleTime(module, inside, n * per_call, round(us * per_call, 2))
        for (module, inside), (n, us) in sorted(tally.by_module.items(), key=lambda item: -item[1][1])
    )
    return PhaseTime(
        name=name,
        calls=calls,
        copy_calls=tally.operators["aten::copy_"] * per_call,
        to_copy_calls=tally.operators["aten::_to_copy"] * per_call,
        copy_kernels=tally.copy_kernels * per_call,
        copy_us=round(tally.copy_us * per_call, 2),
        device_us=round(tally.device_us * per_call, 2),
        modules=modules,
    )


def _notes(name: str, tally: _Tally) -> Iterator[str]:
    if tally.graph_launches:
        yield (
            f"{name}: {tally.graph_launches} graph launches; kernels replayed from a graph carry no operator and no"
            " module, so their copies are known by kernel name only."
        )
    if tally.compiled_regions:
        yield (
            f"{name}: {tally.compiled_regions} compiled regions ran; a conversion fused into a compiled kernel is"
            " neither a copy nor visible."
        )
    if tally.unclaimed_copies:
        yield f"{name}: {tally.unclaimed_copies} copy kernels belong to no operator in sight (found by kernel name)."
