"""Records the dataflow of a running PyTorch program without keeping any of its tensors alive."""

from __future__ import annotations

import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from turnout.audit import dtypes, opset
from turnout.audit.graph import Graph, Op, Source, Storage, View
from turnout.audit.modules import ModuleStack

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_DYNAMO = str(Path(torch.__file__).parent / "_dynamo" / "eval_frame.py")


class Recorder(TorchDispatchMode):
    """Records every operator that runs while the recorder is active.

    A storage is known by a weak reference to it: its address is not reused while the reference is held, and its
    memory is freed as soon as the program lets go of it. Recording is per thread, as dispatch modes are.

    Args:
        root: the audited module, whose names the report uses; other modules are named by class.

    Attributes:
        graph: what was recorded so far.
        seconds: wall time of each call, the recorder's own work included.
        error: the exception that ended a call early, in words (itself it would hold tensors); "" if none did.
    """

    def __init__(self, root: torch.nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.seconds: list[float] = []
        self.error = ""
        self.modules = ModuleStack(root)
        self._weak: dict[int, _WeakStorage] = {}
        if root is not None:
            self._name_tensors(root.named_parameters(), "parameter")
            self._name_tensors(root.named_buffers(), "buffer")

    @contextmanager
    def call(self, phase: str, arguments: Iterable[Any] = ()) -> Iterator[list[Any]]:
        """Record one call of the audited program.

        Args:
            phase: a word for the report, such as "prefill" or "decode".
            arguments: what the call is given, so that its tensors are known as arguments.

        Yields:
            A list for what the call returns: what is in it when the block ends counts as kept by the caller.
        """
        index = len(self.graph.calls)
        self.graph.calls.append(phase)
        for position, leaf in enumerate(tree_leaves(list(arguments))):
            if isinstance(leaf, torch.Tensor):
                self._storage_of(leaf, origin="argument", label=f"argument {position}")
        kept: list[Any] = []
        begin = time.perf_counter()
        try:
            with self.modules, self:
                yield kept
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.seconds.append(time.perf_counter() - begin)
            self._note_deaths(index)

    def run(self, phase: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `fn` under the recorder and return what it returns."""
        with self.call(phase, [args, kwargs]) as kept:
            kept.append(fn(*args, **kwargs))
        return kept[0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator and record it, or take it apart and record its parts."""
        kwargs = kwargs or {}
        traits = opset.traits_of(func)
        if traits.composite:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        operands = _operands(traits, args, kwargs)
        reads = tuple(self._view(t) for name, t in operands if not traits.is_view and _is_read(traits, name))
        out = func(*args, **kwargs)
        self._record(traits, operands, reads, out, kwargs)
        return out

    def _record(
        self,
        traits: opset.OpTraits,
        operands: list[tuple[str, torch.Tensor]],
        reads: tuple[View, ...],
        out: Any,
        kwargs: dict[str, Any],
    ) -> None:
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if traits.is_view:
            self._adopt(operands, results)
            return
        index = len(self.graph.ops)
        source, compiled = _caller()
        op = Op(index, traits.name, self.modules.current, source, max(len(self.graph.calls) - 1, 0), reads)
        op.compiled = compiled
        op.any_strides = traits.any_strides
        op.non_blocking = bool(kwargs.get("non_blocking", False))
        masked = any(name == "indices" and t.dtype in (torch.bool, torch.uint8) for name, t in operands)
        op.host_wait = opset.why_host_waits(traits.name, traits.packet, masked)
        op.value_preserving = _values_survive(traits, operands, results)
        written = [t for name, t in operands if name in traits.written]
        known = {self._key(t) for _, t in operands}
        fresh = [t for t in results if self._key(t) not in known]
        writes = [self._write(t, traits.scattered) for t in written]
        writes += [self._produce(t, index) for t in fresh]
        op.writes = tuple(view for view, _ in writes)
        op.full_writes = tuple(full for _, full in writes)
        op.results = tuple(self._view(t) for t in results)
        self.graph.add(op)

    def _adopt(self, operands: list[tuple[str, torch.Tensor]], results: list[torch.Tensor]) -> None:
        """A view of a wrapper subclass gets a storage object of its own: file it under its base's."""
        if not operands:
            return
        base = self._storage_of(operands[0][1])
        for tensor in results:
            if self._lookup(tensor) is None:
                self._weak[self._key(tensor)] = _WeakStorage(tensor, base.index)

    def _write(self, tensor: torch.Tensor, scattered: bool) -> tuple[View, bool]:
        storage = self._storage_of(tensor)
        full = not scattered and self._view(tensor).nbytes >= storage.nbytes
        storage.versions += 1
        storage.epochs += full
        return self._view(tensor), full

    def _produce(self, tensor: torch.Tensor, op: int) -> tuple[View, bool]:
        if self._lookup(tensor) is not None:  # an opaque operator handed out memory that is known already
            return self._write(tensor, scattered=False)
        storage = self._storage_of(tensor, producer=op)
        storage.versions = storage.epochs = 1
        return self._view(tensor), True

    def _view(self, tensor: torch.Tensor) -> View:
        storage = self._storage_of(tensor)
        strided = tensor.layout == torch.strided
        return View(
            storage=storage.index,
            version=storage.versions,
            epoch=storage.epochs,
            dtype=tensor.dtype,
            device=tensor.device.type,
            shape=tuple(n if isinstance(n, int) else -1 for n in tensor.shape),
            stride=tuple(n if isinstance(n, int) else -1 for n in tensor.stride()) if strided else (-1,) * tensor.dim(),
            offset=int(tensor.storage_offset()) if strided else 0,
        )

    def _storage_of(
        self, tensor: torch.Tensor, *, producer: int | None = None, origin: str = "captured", label: str = ""
    ) -> Storage:
        known = self._lookup(tensor)
        if known is not None:
            return known
        if origin == "captured" and isinstance(tensor, torch.nn.Parameter):
            origin = "parameter"  # of a module that is not the audited one
        storage = Storage(
            index=len(self.graph.storages),
            nbytes=_storage_nbytes(tensor),
            producer=producer,
            origin=origin if producer is None else "",
            label=label,
            born_in=max(len(self.graph.calls) - 1, 0),
        )
        self.graph.storages.append(storage)
        self._weak[self._key(tensor)] = _WeakStorage(tensor, storage.index)
        return storage

    def _lookup(self, tensor: torch.Tensor) -> Storage | None:
        entry = self._weak.get(self._key(tensor))
        return None if entry is None or entry.is_dead() else self.graph.storages[entry.index]

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else -id(tensor)

    def _name_tensors(self, named: Iterable[tuple[str, torch.Tensor]], origin: str) -> None:
        for name, tensor in named:
            self._storage_of(tensor, origin=origin, label=self.modules.clean(name))

    def _note_deaths(self, call: int) -> None:
        gc.collect()  # a reference cycle must not pass for a tensor that the program keeps
        for key, entry in list(self._weak.items()):
            if entry.is_dead():
                self.graph.storages[entry.index].died_in = call
                del self._weak[key]


class _WeakStorage:
    """A weak reference to a tensor's memory; for a sparse tensor, which has no storage, to the tensor."""

    __slots__ = ("_ref", "index")

    def __init__(self, tensor: torch.Tensor, index: int) -> None:
        self.index = index
        self._ref: StorageWeakRef | weakref.ref[torch.Tensor]
        if tensor.layout == torch.strided:
            self._ref = StorageWeakRef(tensor.untyped_storage())
        else:
            self._ref = weakref.ref(tensor)

    def is_dead(self) -> bool:
        """Whether the memory has been freed."""
        if isinstance(self._ref, StorageWeakRef):
            return bool(self._ref.expired())
        return self._ref() is None


def _operands(traits: opset.OpTraits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Tensor arguments with the names that the schema gives them, lists flattened."""
    named = [*zip(traits.argument_names, args, strict=False), *kwargs.items()]
    return [(name, leaf) for name, value in named for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _is_read(traits: opset.OpTraits, name: str) -> bool:
    return traits.reads_values and name not in traits.write_only


def _values_survive(
    traits: opset.OpTraits, operands: list[tuple[str, torch.Tensor]], results: list[torch.Tensor]
) -> bool | None:
    """For an integer conversion that the dtypes do not vouch for: look at the values, while they are here."""
    if traits.packet not in opset.COPY_PACKETS or not operands or not results:
        return None
    source, target = operands[-1][1], results[0].dtype
    if source.dtype == target or dtypes.keeps_every_value(source.dtype, target):
        return None
    if not dtypes.may_keep_values(source.dtype, target):
        return None
    with _disable_current_modes():
        return dtypes.kept_values(source, target)


def _storage_nbytes(tensor: torch.Tensor) -> int:
    if tensor.layout != torch.strided:
        count = tensor.numel()
        return count * tensor.element_size() if isinstance(count, int) else 0  # a nested tensor counts in symbols
    return int(tensor.untyped_storage().nbytes())


def _caller() -> tuple[Source, bool]:
    """The innermost line outside PyTorch and this package, and whether it belongs to compiled code."""
    frame: FrameType | None = sys._getframe(2)
    found = Source("", 0, "")
    while frame is not None:
        name = frame.f_code.co_filename
        if name == _DYNAMO and frame.f_code.co_name == "compile_wrapper":
            return found, True
        if not found.file and not name.startswith((_TORCH, _HERE, "<frozen")):
            found = Source(name, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return found, False
