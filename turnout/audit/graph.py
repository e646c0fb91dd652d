"""The recorded dataflow: operators, the memory they read and wrote, and who touched what when.

Identity is a storage and the number of writes it has seen, never a Python object: a view, a `detach()` and a
`.data` of one tensor are the same memory. Nothing here holds a tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class View:
    """What one operand of an operator covers of a storage.

    Attributes:
        storage: index into `Graph.storages`.
        version: writes the storage had seen when the operand was read (or just after it was written).
        epoch: as `version`, but counting only writes that replaced the whole storage: views of one epoch may
            still hold elements in common across partial writes.
        shape, stride, offset: in elements of `dtype`; -1 where there is none, as in sparse and nested tensors.
    """

    storage: int
    version: int
    epoch: int
    dtype: torch.dtype
    device: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= abs(size)
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the elements covered, each counted once per index."""
        return self.numel * self.dtype.itemsize

    @property
    def is_strided(self) -> bool:
        """Whether sizes and strides say where its elements lie."""
        return -1 not in self.shape and -1 not in self.stride

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after the other in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size == 0:
                return True
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def elements(self) -> tuple[object, ...]:
        """A key that two views share when they cover the same elements in the same order."""
        if self.is_contiguous:
            return (self.offset, self.numel)
        kept = [(n, s) for n, s in zip(self.shape, self.stride, strict=True) if n != 1]
        return (self.offset, tuple(kept))


@dataclass(frozen=True, slots=True)
class Source:
    """The line of the audited program that issued an operator."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


@dataclass(slots=True)
class Op:
    """One operator as it ran.

    Attributes:
        name: for instance ``aten._to_copy.default``.
        reads, writes: operands whose elements were read, written. A view operator has neither.
        full_writes: for each of `writes`, whether it replaced the whole storage.
        results: fresh or written tensors that the operator returned.
        module: dotted path of the innermost module that was running; "" outside any.
        call: index into `Graph.calls`.
        value_preserving: for a conversion, whether each value of this run survived; None where it was not
            looked at (the dtypes alone decide, or the tensor has no values).
        non_blocking: the caller asked for an asynchronous transfer.
        any_strides: it is known to read any strides as they are.
        host_wait: why the host waits for the device here; "" where it does not.
        compiled: the operator belongs to code under `torch.compile`, which the recorder runs uncompiled.
    """

    index: int
    name: str
    module: str
    source: Source
    call: int
    reads: tuple[View, ...] = ()
    writes: tuple[View, ...] = ()
    full_writes: tuple[bool, ...] = ()
    results: tuple[View, ...] = ()
    value_preserving: bool | None = None
    non_blocking: bool = False
    any_strides: bool = False
    host_wait: str = ""
    compiled: bool = False

    @property
    def packet(self) -> str:
        """Name without its overload: ``aten.add`` of ``aten.add.Tensor``."""
        return ".".join(self.name.split(".")[:2])

    @property
    def is_opaque(self) -> bool:
        """Whether the operator is somebody's own: what happens inside is not seen."""
        return not self.name.startswith(("aten.", "prims."))


@dataclass(slots=True)
class Storage:
    """One piece of memory.

    Attributes:
        producer: the operator that allocated it; None where it existed before the recording.
        origin: for memory without a producer: "parameter", "buffer", "argument" or "captured".
        label: the parameter's or argument's name, where it has one.
        born_in: the call in which it was first seen.
        died_in: the first call at whose end it was no longer alive; None while it lives.
        versions: writes that it has seen.
        epochs: of those, the ones that replaced all of it.
    """

    index: int
    nbytes: int
    producer: int | None
    origin: str = ""
    label: str = ""
    born_in: int = 0
    died_in: int | None = None
    versions: int = 0
    epochs: int = 0

    @property
    def is_external(self) -> bool:
        """Whether it existed before the recorded program touched it."""
        return self.producer is None

    @property
    def lasts(self) -> bool:
        """Whether it is a parameter, a buffer or the like: there before the first call and after the last."""
        return self.is_external and self.origin != "argument" and self.died_in is None

    @property
    def outlives_its_call(self) -> bool:
        """Whether it was alive when the call that made it ended: returned, cached or held by the caller."""
        return self.died_in is None or self.died_in > self.born_in


@dataclass(frozen=True, slots=True)
class Access:
    """One operator's touch of a storage."""

    op: int
    view: View


@dataclass(slots=True)
class Graph:
    """Everything that was recorded, in program order."""

    ops: list[Op] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    _reads: dict[int, list[Access]] = field(default_factory=lambda: defaultdict(list))
    _writes: dict[int, list[Access]] = field(default_factory=lambda: defaultdict(list))

    def add(self, op: Op) -> None:
        """Append an operator and index its operands."""
        self.ops.append(op)
        for view in op.reads:
            self._reads[view.storage].append(Access(op.index, view))
        for view in op.writes:
            self._writes[view.storage].append(Access(op.index, view))

    def reads_of(self, storage: int) -> list[Access]:
        """Reads of a storage in program order."""
        return self._reads.get(storage, [])

    def writes_to(self, storage: int) -> list[Access]:
        """Writes to a storage in program order, the operator that allocated it included."""
        return self._writes.get(storage, [])

    def reads_of_value(self, view: View) -> list[Access]:
        """Reads of the value that `view` belongs to, before or after partial writes to it."""
        return [access for access in self.reads_of(view.storage) if access.view.epoch == view.epoch]

    def writes_after(self, op: int, storage: int) -> list[Access]:
        """Writes to a storage by operators later than `op`."""
        return [access for access in self.writes_to(storage) if access.op > op]

    def writer_of(self, view: View) -> Op | None:
        """The operator that wrote the version that `view` shows; None for memory from outside."""
        writer = None
        for access in self.writes_to(view.storage):
            if access.view.version > view.version:
                break
            writer = self.ops[access.op]
        return writer

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)
