"""Would the program compute the same without a copy? And where does a value come from?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from turnout.audit import opset
from turnout.audit.graph import Access, Graph, Op, Storage, View
from turnout.audit.layout import overlap


@dataclass(frozen=True, slots=True)
class Conflict:
    """Why a copy cannot be replaced by what it copied.

    Attributes:
        certain: False where it could not be shown either way.
        reason: one clause.
    """

    certain: bool
    reason: str


@dataclass(frozen=True, slots=True)
class CopyOp:
    """A copy, and what it copied."""

    op: Op
    source: View
    target: View

    @property
    def is_cast(self) -> bool:
        """Whether it changes the dtype."""
        return self.source.dtype != self.target.dtype

    @property
    def is_fresh(self) -> bool:
        """Whether it allocated its result; a `copy_` fills memory that somebody else chose."""
        return self.op.packet != "aten.copy_"

    @property
    def crosses_devices(self) -> bool:
        """Whether it moves data from one device to another."""
        return self.source.device != self.target.device


def copies_of(graph: Graph) -> dict[int, CopyOp]:
    """Every copy in a graph that moves at least one element, by operator index."""
    found = {}
    for op in graph:
        if op.packet not in opset.COPY_PACKETS or len(op.writes) != 1:
            continue
        sources = [view for view in op.reads if view.numel]
        if len(sources) == 1:
            found[op.index] = CopyOp(op, sources[0], op.writes[0])
    return found


class Sharing:
    """Which pieces of memory could be one, as copies are found to be needless one after the other.

    A copy that is needless by itself may be needed once another one is gone (`x.clone().clone()` before
    `x.add_(1)`), so each is judged against everything that its source already shares memory with.

    Args:
        graph: the recorded program.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._groups: dict[int, list[_Member]] = {}

    def conflict(self, copy: CopyOp, source: View, since: int) -> Conflict | None:
        """What would go wrong if the readers of a copy read `source` instead; None if nothing would.

        Args:
            copy: the copy in question.
            source: what its readers would read: what was copied, or something that held the same values.
            since: the operator at which `source` held them.
        """
        used = bool(_wanted_after(self._graph, Access(copy.op.index, copy.target), copy.target))
        found = []
        for view in self._in_one_memory(source):
            conflict = conflict_without(self._graph, copy, view)
            if conflict is None and used:
                conflict = overwritten_between(self._graph, view, since, copy)
            if conflict is not None:
                # What another member of the group shows may be a part only, so that nothing need go wrong.
                found.append(conflict if view.numel == source.numel else replace(conflict, certain=False))
        return max(found, key=lambda conflict: conflict.certain, default=None)

    def merge(self, copy: CopyOp, source: View) -> None:
        """From now on the copy and `source` count as one piece of memory."""
        group = self._groups.setdefault(source.storage, [])
        base = self._base(source)
        group += [_Member(source, base), _Member(copy.target, base)]
        self._groups[copy.target.storage] = group

    def _base(self, view: View) -> View:
        """Where a view lies in the memory that its group shares; for a part of a member, where that member lies."""
        bases = [member.base for member in self._groups.get(view.storage, []) if member.view.storage == view.storage]
        return bases[0] if bases and bases[0].storage != view.storage else view

    def _in_one_memory(self, source: View) -> list[View]:
        """Members of the source's group that show some of its elements, itself first."""
        base = self._base(source)
        group = self._groups.get(source.storage, [])
        return [source, *(m.view for m in group if m.view != source and overlap(m.base, base) is not False)]


@dataclass(frozen=True, slots=True)
class _Member:
    """A view that shares memory with others, and where in that memory it lies."""

    view: View
    base: View


def conflict_without(graph: Graph, copy: CopyOp, source: View) -> Conflict | None:
    """What would go wrong if the readers of a copy read `source` instead; None if nothing would.

    Args:
        graph: the recorded program.
        copy: the copy in question.
        source: what the readers would read: what was copied, or something that holds the same values.
    """
    target = copy.target
    for written, other in ((source, target), (target, source)):
        for write in graph.writes_after(copy.op.index, written.storage):
            shared = overlap(write.view, written)
            if shared is not False and (wanted := _wanted_after(graph, write, other)):
                certain = bool(shared) and _meets(write, written, other, wanted)
                which = "original" if written is source else "copy"
                reason = f"the {which} is overwritten by {name_of(graph.ops[write.op])} while the other is in use"
                return Conflict(certain, reason)
    return None


def overwritten_between(graph: Graph, view: View, since: int, copy: CopyOp) -> Conflict | None:
    """A write to `view` after operator `since` and before a copy: what the copy should show is gone by then."""
    born = graph.storages[view.storage].producer
    for write in graph.writes_after(since if born is None else max(since, born), view.storage):
        if write.op < copy.op.index and overlap(write.view, view) is not False:
            return Conflict(False, f"the original was overwritten by {name_of(graph.ops[write.op])}")
    return None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Later use of memory: reads, and whether the program keeps it as it then is."""

    reads: list[Access]
    kept: bool

    def __bool__(self) -> bool:
        return self.kept or bool(self.reads)


def _wanted_after(graph: Graph, write: Access, other: View) -> _Wanted:
    """Uses of what `other` shows at the time of a write elsewhere, until all of it is overwritten."""
    epoch, last = other.epoch, other.epoch
    for access in graph.writes_to(other.storage):
        last = access.view.epoch
        if access.op < write.op:
            epoch = max(epoch, last)
    reads = [
        access
        for access in graph.reads_of(other.storage)
        if access.op >= write.op and access.view.epoch == epoch and overlap(access.view, other) is not False
    ]
    return _Wanted(reads, last == epoch and graph.storages[other.storage].outlives_its_call)


def _meets(write: Access, written: View, other: View, wanted: _Wanted) -> bool:
    """Whether a later use surely sees the write: a write to one part and a use of another need not meet."""
    later = [access for access in wanted.reads if access.op > write.op]
    if write.view.numel >= written.numel:
        return wanted.kept or bool(later)
    return any(access.view.numel >= other.numel for access in later)


def origin_of(graph: Graph, copies: dict[int, CopyOp], view: View) -> Op | Storage:
    """Who made a value: the operator that computed it, or the memory from outside that holds it.

    Copies that keep the dtype pass the value on, so the search goes through them.
    """
    while True:
        writer = graph.writer_of(view)
        if writer is None:
            return graph.storages[view.storage]
        copy = copies.get(writer.index)
        if copy is None or copy.is_cast or not copy.is_fresh:
            return writer
        view = copy.source


def readers(accesses: list[Access]) -> list[int]:
    """The operators of some accesses, each once, in program order."""
    return sorted({access.op for access in accesses})


def name_of(op: Op) -> str:
    """An operator for a person: what, in which module."""
    plain = op.packet.removeprefix("aten.")
    what = "cast" if plain == "_to_copy" else plain.strip("_")
    return f"{what} in {op.module}" if op.module else what
