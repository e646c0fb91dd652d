"""Decides for every recorded copy whether the program needed it, and says by what evidence.

Only what the recorded dataflow shows is claimed. Where it does not decide, the verdict is "undecided" and the
evidence says what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from turnout.audit import dtypes
from turnout.audit.aliasing import CopyOp, Sharing, copies_of, name_of, origin_of, readers
from turnout.audit.graph import Graph, Op, Storage
from turnout.audit.layout import as_view_of, gemm_reads, is_whole, same_layout
from turnout.audit.opset import is_gemm


class CopyKind(StrEnum):
    """Classes of copies and of waits.

    Examples:
        >>> sorted(kind.value for kind in REDUNDANT)
        ['dtype mismatch', 'layout', 'repeated', 'round trip']
    """

    DTYPE_MISMATCH = "dtype mismatch"
    ROUND_TRIP = "round trip"
    REPEATED = "repeated"
    LAYOUT = "layout"
    HOST = "host"
    FUSABLE = "fusable"
    NEEDED = "needed"
    UNDECIDED = "undecided"


# What a budget counts.
REDUNDANT = frozenset({CopyKind.DTYPE_MISMATCH, CopyKind.ROUND_TRIP, CopyKind.REPEATED, CopyKind.LAYOUT})


@dataclass(frozen=True, slots=True)
class Verdict:
    """A class with its grounds.

    Attributes:
        kind: the class.
        evidence: what in the recording shows it.
        remedy: what to do about it, one sentence; "" where nothing is to be done.
    """

    kind: CopyKind
    evidence: str
    remedy: str = ""


class Classifier:
    """Classifies the copies and waits of one recording.

    Args:
        graph: a finished recording.

    Attributes:
        copies: every copy of the recording, by operator index.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.copies = copies_of(graph)
        self._sharing = Sharing(graph)
        self._first_like: dict[tuple[object, ...], CopyOp] = {}
        self._undoes: dict[int, int] = {}
        # In program order, since each copy that goes changes what its successors may do.
        self._needless = {i: verdict for i, copy in self.copies.items() if (verdict := self._shareable(copy))}

    def verdict(self, op: Op) -> Verdict | None:
        """The verdict on one operator; None where it is neither a copy nor a wait."""
        if op.host_wait:
            return Verdict(CopyKind.HOST, op.host_wait, "Keep the value on the device, or fix the size beforehand.")
        copy = self.copies.get(op.index)
        if copy is None:
            return None
        if copy.crosses_devices:
            return _transfer(copy)
        if op.index in self._needless:
            return self._needless[op.index]
        return self._cast(copy) if copy.is_cast else _fills(self.graph.storages[copy.target.storage])

    def consumers(self, copy: CopyOp) -> list[Op]:
        """Operators that read a copy's result."""
        return [self.graph.ops[i] for i in readers(self.graph.reads_of_value(copy.target)) if i > copy.op.index]

    def producer(self, copy: CopyOp) -> Op | Storage:
        """Who made the value that was copied."""
        return origin_of(self.graph, self.copies, copy.source)

    # First pass: copies whose readers could read memory that already holds what they want.

    def _shareable(self, copy: CopyOp) -> Verdict | None:
        if copy.crosses_devices or not copy.is_fresh:
            return None
        if not copy.is_cast:
            verdict = self._same_dtype(copy)
            if verdict.kind is CopyKind.LAYOUT:
                self._sharing.merge(copy, copy.source)
            return verdict
        view = copy.source
        key = (view.storage, view.version, view.dtype, view.elements, copy.target.dtype)
        first = copy if self._written_later(copy) else self._first_like.setdefault(key, copy)
        return self._second_leg(copy) or self._repeated(copy, first)

    def _second_leg(self, copy: CopyOp) -> Verdict | None:
        """A cast that undoes an earlier one."""
        writer = origin_of(self.graph, self.copies, copy.source)
        first = self.copies.get(writer.index) if isinstance(writer, Op) else None
        if first is None or not first.is_fresh or not self._keeps_values(first):
            return None
        if first.source.dtype != copy.target.dtype:
            return None
        if self._sharing.conflict(copy, first.source, first.op.index) is not None:
            return None
        self._sharing.merge(copy, first.source)
        self._undoes[copy.op.index] = first.op.index
        a, b = dtypes.short_name(copy.source.dtype), dtypes.short_name(copy.target.dtype)
        return Verdict(
            CopyKind.ROUND_TRIP,
            f"undoes {name_of(first.op)}: {b} -> {a} -> {b}, nothing computed in {a}, every value kept",
            f"Read the {b} tensor from before {name_of(first.op)}.",
        )

    def _repeated(self, copy: CopyOp, first: CopyOp) -> Verdict | None:
        """A cast of an unchanged tensor that was, or at the next call will be, cast to the same dtype again."""
        if self._written_later(copy):
            return None
        dtype = dtypes.short_name(copy.target.dtype)
        shares = first is not copy and self._sharing.conflict(copy, first.target, first.op.index) is None
        if shares:
            self._sharing.merge(copy, first.target)
        source = self.graph.storages[copy.source.storage]
        belongs_to_a_module = source.origin in ("parameter", "buffer")
        if belongs_to_a_module and source.lasts and source.versions == 0 and not self._is_kept(copy):
            what = f"{source.origin} {source.label}".strip()
            return Verdict(
                CopyKind.REPEATED,
                f"{what} does not change, and its {dtype} form is dropped: every call casts it again",
                f"Store the {what} as {dtype}, or keep the result of the first cast.",
            )
        if not shares:
            return None
        return Verdict(
            CopyKind.REPEATED,
            f"{name_of(first.op)} produced the {dtype} form of the same unchanged tensor before",
            f"Share the result of {name_of(first.op)}.",
        )

    def _same_dtype(self, copy: CopyOp) -> Verdict:
        if not copy.source.is_strided:
            return Verdict(CopyKind.UNDECIDED, "a sparse or nested tensor: what it shares with others is not followed")
        target, source = self.graph.storages[copy.target.storage], self.graph.storages[copy.source.storage]
        conflict = self._sharing.conflict(copy, copy.source, copy.op.index)
        if conflict is not None:
            return Verdict(CopyKind.NEEDED if conflict.certain else CopyKind.UNDECIDED, conflict.reason)
        if target.outlives_its_call and source.outlives_its_call:
            return Verdict(CopyKind.UNDECIDED, "the caller keeps both: whether it needs two is not seen")
        if self._is_unread(copy):
            return _UNREAD
        if not same_layout(copy.source, copy.target):
            return self._other_layout(copy)
        if target.outlives_its_call and source.nbytes > target.nbytes:
            return Verdict(CopyKind.UNDECIDED, f"without the copy {source.nbytes} bytes would stay allocated")
        return Verdict(
            CopyKind.LAYOUT,
            "the source has the same shape and strides, and neither is overwritten while the other is in use",
            "Read the source.",
        )

    def _other_layout(self, copy: CopyOp) -> Verdict:
        if self._is_kept(copy) or self._written_later(copy):
            return Verdict(CopyKind.UNDECIDED, "the result is kept or written in place, in another layout")
        used = self.consumers(copy)
        if len(used) != 1:
            return Verdict(CopyKind.UNDECIDED, f"{len(used)} operators read the new layout: it may pay")
        reader = used[0]
        for wanted in (view for view in reader.reads if view.storage == copy.target.storage):
            if not is_whole(copy.target, wanted):
                return Verdict(CopyKind.UNDECIDED, f"{name_of(reader)} reads a part of the new layout")
            view = as_view_of(copy.source, copy.target, wanted)
            if view is None:
                return Verdict(CopyKind.NEEDED, f"no strides show the source as {name_of(reader)} reads it")
            if is_gemm(reader.packet) and not gemm_reads(view):
                return Verdict(CopyKind.NEEDED, f"{name_of(reader)} cannot read the source's strides")
        if reader.any_strides or is_gemm(reader.packet):
            return Verdict(
                CopyKind.LAYOUT,
                f"read once, by {name_of(reader)}, which takes the source's strides as they are",
                "Drop the copy and pass the strided view.",
            )
        return Verdict(CopyKind.UNDECIDED, f"whether {name_of(reader)} takes these strides is not known")

    def _written_later(self, copy: CopyOp) -> bool:
        return bool(self.graph.writes_after(copy.op.index, copy.target.storage))

    def _is_kept(self, copy: CopyOp) -> bool:
        return self.graph.storages[copy.target.storage].outlives_its_call

    def _is_unread(self, copy: CopyOp) -> bool:
        return not self._is_kept(copy) and not self.consumers(copy) and not self._written_later(copy)

    @staticmethod
    def _keeps_values(copy: CopyOp) -> bool:
        lossless = dtypes.keeps_every_value(copy.source.dtype, copy.target.dtype)
        return lossless or copy.op.value_preserving is True

    # Second pass: the other casts.

    def _cast(self, copy: CopyOp) -> Verdict:
        if copy.is_fresh and self._is_unread(copy):
            return _UNREAD
        if self._is_first_leg(copy):
            dtype = dtypes.short_name(copy.source.dtype)
            evidence = f"its only readers cast it back to {dtype}"
            return Verdict(CopyKind.ROUND_TRIP, evidence, f"Drop both casts and read the {dtype} tensor.")
        return self._widening(copy) if self._keeps_values(copy) else self._rounding(copy)

    def _is_first_leg(self, copy: CopyOp) -> bool:
        used = self.consumers(copy)
        if not used or self._is_kept(copy) or self._written_later(copy):
            return False
        return all(self._undoes.get(self._through_copies(op)) == copy.op.index for op in used)

    def _through_copies(self, op: Op) -> int:
        """The operator at the end of a chain of same-dtype copies that each have one reader."""
        while (copy := self.copies.get(op.index)) is not None and not copy.is_cast:
            used = self.consumers(copy)
            if len(used) != 1:
                break
            op = used[0]
        return op.index

    def _widening(self, copy: CopyOp) -> Verdict:
        a, b = dtypes.short_name(copy.source.dtype), dtypes.short_name(copy.target.dtype)
        producer = self.producer(copy)
        if isinstance(producer, Storage):
            return self._from_outside(copy, producer)
        other = [i for i in readers(self.graph.reads_of_value(copy.source)) if not self._casts_to(i, copy)]
        if other:
            names = ", ".join(name_of(self.graph.ops[i]) for i in other[:2])
            return Verdict(CopyKind.NEEDED, f"both forms are read: {names} reads {a}")
        if self.graph.storages[copy.source.storage].outlives_its_call:
            return Verdict(CopyKind.UNDECIDED, f"the {a} form is returned or kept as well: who reads it is not seen")
        note = "" if copy.op.value_preserving is None else f" (every value of this run exists in {b})"
        store = f"round to {a} and store it as {b}" if copy.source.dtype.is_floating_point else f"store {b}"
        return Verdict(
            CopyKind.DTYPE_MISMATCH,
            f"{name_of(producer)} stores {a}, and every reader reads it as {b}{note}",
            f"Let {name_of(producer)} {store}, or its reader take {a}.",
        )

    def _casts_to(self, op: int, like: CopyOp) -> bool:
        copy = self.copies.get(op)
        return copy is not None and copy.target.dtype == like.target.dtype and not copy.crosses_devices

    def _rounding(self, copy: CopyOp) -> Verdict:
        a, b = copy.source.dtype, copy.target.dtype
        if dtypes.may_keep_values(a, b) and copy.op.value_preserving is None:
            return Verdict(CopyKind.UNDECIDED, "the values were not there to look at")
        if not (a.is_floating_point and b.is_floating_point):
            return Verdict(CopyKind.NEEDED, "the conversion computes: values change")
        producer = self.producer(copy)
        if isinstance(producer, Storage):
            return self._from_outside(copy, producer)
        return Verdict(
            CopyKind.FUSABLE,
            f"{name_of(producer)} stores {dtypes.short_name(a)}, then it is rounded",
            f"Round inside {name_of(producer)} as it stores.",
        )

    def _from_outside(self, copy: CopyOp, source: Storage) -> Verdict:
        a, b = dtypes.short_name(copy.source.dtype), dtypes.short_name(copy.target.dtype)
        if source.origin == "argument":
            return Verdict(CopyKind.UNDECIDED, f"the caller passes {a} ({source.label}); who makes it is not seen",
                           f"Pass {b} if whoever makes {source.label} can store that.")  # fmt: skip
        if self._is_kept(copy):
            return Verdict(CopyKind.NEEDED, f"cast once: the {b} form is kept")
        return Verdict(CopyKind.UNDECIDED, f"the tensor comes from outside the recording ({source.origin})")


_UNREAD = Verdict(CopyKind.UNDECIDED, "no operator read the result; a read outside PyTorch would not be seen")


def _fills(target: Storage) -> Verdict:
    if target.outlives_its_call:
        return Verdict(CopyKind.NEEDED, "fills memory that outlives the call")
    return Verdict(CopyKind.UNDECIDED, "fills a buffer: whether the producer could write there is not known")


def _transfer(copy: CopyOp) -> Verdict:
    moved = f"{copy.source.nbytes} bytes go from {copy.source.device} to {copy.target.device}"
    if copy.op.non_blocking or "cpu" not in (copy.source.device, copy.target.device):
        return Verdict(CopyKind.NEEDED, f"{moved} without waiting")
    return Verdict(CopyKind.HOST, moved, "Keep the tensor on one device, or pin it and pass non_blocking=True.")
