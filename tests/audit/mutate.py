"""Plants one copy in a running model, or takes one out, between the model and the recorder.

A place is the index of an operator in an unchanged recording: runs are deterministic, so the index finds the same
operator again.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from turnout.audit import opset
from turnout.audit.aliasing import copies_of
from turnout.audit.graph import Graph
from turnout.audit.recorder import Recorder
from turnout.audit.report import AuditReport

CAST = "aten._to_copy"


@torch.library.custom_op("turnout_mutant::stored_as", mutates_args=())
def stored_as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A producer that stores what its reader wants: nothing inside is in sight."""
    return values.to(dtype)


class Mutator(TorchDispatchMode):
    """Stands between a model and a recorder; subclasses change what happens at one operator."""

    def __init__(self, recorder: Recorder, place: int) -> None:
        super().__init__()
        self.recorder, self.place = recorder, place
        self.done = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if opset.traits_of(func).is_view:
            return func(*args, **kwargs)
        if not self.done and len(self.recorder.graph.ops) == self.place:
            self.done = True
            return self.at_place(func, args, kwargs)
        return func(*args, **kwargs)

    def at_place(self, func, args, kwargs):
        raise NotImplementedError


class PlantClone(Mutator):
    kinds: ClassVar = Counter({"layout": 1})

    def at_place(self, func, args, kwargs):
        return on_tensors(torch.ops.aten.clone.default, func(*args, **kwargs))


class PlantRoundTrip(Mutator):
    kinds: ClassVar = Counter({"round trip": 2})

    def at_place(self, func, args, kwargs):
        def there_and_back(y):
            other = torch.int32 if y.dtype == torch.int64 else torch.float32
            return torch.ops.aten._to_copy(torch.ops.aten._to_copy(y, dtype=other), dtype=y.dtype)

        return on_tensors(there_and_back, func(*args, **kwargs))


class PlantMismatch(Mutator):
    """As before PR #40565: the producer stores int32, and a cast to int64 follows."""

    kinds: ClassVar = Counter({"dtype mismatch": 1})

    def at_place(self, func, args, kwargs):
        with _disable_current_modes():
            out = func(*args, **kwargs)
        narrow = on_tensors(lambda y: stored_as(y, torch.int32), out)
        return on_tensors(lambda y: torch.ops.aten._to_copy(y, dtype=torch.int64), narrow)


class PlantRepetition(Mutator):
    kinds: ClassVar = Counter({"repeated": 1})

    def at_place(self, func, args, kwargs):
        out = func(*args, **kwargs)
        func(*args, **kwargs)
        return out


class RemoveCast(Mutator):
    """The producer stores what the reader wants, so there is nothing to cast."""

    def at_place(self, func, args, kwargs):
        return stored_as(args[0], kwargs["dtype"])


class RemoveRepetition(Mutator):
    """The result of an earlier cast is kept and used again."""

    def at_place(self, func, args, kwargs):
        with _disable_current_modes():
            return func(*args, **kwargs)


class RemoveCopy(Mutator):
    """The readers of a copy read what was copied."""

    def at_place(self, func, args, kwargs):
        tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
        return next(t for t in tensors if t.numel()).detach()


def on_tensors(change, out):
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, out)


def fresh_outputs(graph: Graph, *dtypes: torch.dtype) -> list[int]:
    """Operators that compute one dense new tensor of a dtype: places where a copy can be planted behind them.

    Not behind a copy, since the first of two copies in a row may be needless where it was needed alone; not behind
    an allocation, which has no values yet to survive a cast.
    """
    found = []
    copies = copies_of(graph)
    for op in graph:
        if op.index in copies or op.packet.startswith("aten.empty"):
            continue
        written = [view for view in op.writes if graph.storages[view.storage].producer == op.index]
        if len(written) == 1 == len(op.results) and written[0].numel and written[0].dtype in dtypes:
            found.append(op.index)
    return found


def fingerprint(report: AuditReport) -> Counter:
    """What a report says, copy by copy, without the words."""
    counts: Counter = Counter()
    for f in report.findings:
        counts[f.kind.value, f.op, f.module, f.phase, f.from_dtype, f.to_dtype, f.shape, f.regions] += f.count
    return counts
