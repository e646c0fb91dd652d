"""Launches at little cost to the host."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

# Compiled kernels, by all that they are specialised on: Triton's own look-up takes longer.
_compiled: dict[tuple[Any, ...], Any] = {}
_HERE = contextlib.nullcontext()
_INT32_MAX = 2**31 - 1


def launch_kernel(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor | None, ...],
    numbers: tuple[int, ...],
    constants: tuple[Any, ...],
    num_warps: int,
    **options: Any,
) -> None:
    """Launch a kernel whose arguments are tensors (absent ones None), numbers, constants, in this order.

    Further options of its compilation must be the same in every launch of the kernel.
    The numbers must be among those that the kernel does not specialise on. A kernel seen before is launched on bare
    addresses, the cheapest way.
    """
    addresses: list[int | None] = []
    dtypes: list[torch.dtype | None] = []
    bits = 0  # that any address has
    for tensor in tensors:  # once: each pass takes the host half a microsecond
        if tensor is None:
            addresses.append(None)
            dtypes.append(None)
        else:
            address = tensor.data_ptr()
            bits |= address
            addresses.append(address)
            dtypes.append(tensor.dtype)
    aligned = bits % 16 == 0  # Triton specialises on that; torch allocates no other memory, a view may be of some
    wide = [number > _INT32_MAX for number in numbers]
    key = (kernel, tensors[0].device, constants, num_warps, *wide, *dtypes)
    known = _compiled.get(key) if aligned else None
    if known is not None and are_of_usual_size(tensors):
        stream = current_stream(tensors[0].get_device())  # type: ignore[union-attr]
        launch_compiled(known, grid, stream, (*addresses, *numbers, *constants))
        return
    compiled = kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps, **options)
    if aligned and compiled is not None and are_of_usual_size(tensors):  # the interpreter returns nothing
        _compiled[key] = compiled


def launch_compiled(compiled: Any, grid: tuple[int, int, int], stream: int, arguments: tuple[Any, ...]) -> None:
    """Launch once more what Triton compiled and launched before.

    Triton itself prepares at each call what hooks on launches are shown. Where there are none, the kernel's launcher is
    called without that, which saves the host two microseconds.
    """
    runtime = triton.knobs.runtime
    if not _takes_usual_arguments() or _calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook):
        compiled[grid](*arguments, stream=stream)
    else:
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def _calls(hook: Any) -> Any:
    """What a hook calls, if anything: it is a chain of functions, one function or None."""
    return getattr(hook, "calls", hook)


@functools.cache
def _takes_usual_arguments() -> bool:
    """Whether the installed Triton hands to a kernel's launcher what `launch_compiled` does: seen on a stand-in."""
    kernel, runtime = _NotesWhatIsRun(), triton.knobs.runtime
    try:
        CompiledKernel.__getitem__(kernel, (1, 2, 3))("argument", stream=4)
    except (AttributeError, LookupError, TypeError, ValueError):  # it looks at more of the kernel, or at other things
        return False
    usual = (1, 2, 3, 4, "function", "metadata", None, runtime.launch_enter_hook, runtime.launch_exit_hook, "argument")
    return kernel.given == usual


class _NotesWhatIsRun:
    """A compiled kernel as far as `CompiledKernel.__getitem__` looks at it."""

    function, packed_metadata, given = "function", "metadata", ()

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, *arguments: object) -> None:
        self.given = arguments


def refuse_cpu(kernel: Any, tensor: torch.Tensor, what: str, impl: str = "triton", instead: str = "cpu") -> None:
    """Refuse a tensor on a CPU for a kernel that is compiled; Triton's interpreter runs there.

    Args:
        kernel: what ``@triton.jit`` made.
        tensor: one of the kernel's arguments.
        what: it holds, for the message.
        impl: the implementation that the kernel belongs to.
        instead: one that runs on a CPU.
    """
    if tensor.is_cpu and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"impl={impl!r} needs {what} on a GPU, got a CPU tensor; use impl={instead!r}, or set TRITON_INTERPRET=1 "
            "before the first call to run the kernel in Triton's interpreter"
        )


def are_of_usual_size(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether Triton has one kernel for tensors like these, as large as they are.

    For AMD's GPUs it has two: offsets into storages of less than 2 GiB are taken to fit 32 bits.
    """
    if not _compiles_by_size():
        return True
    return all(tensor is None or tensor.untyped_storage().nbytes() <= _INT32_MAX for tensor in tensors)


@functools.cache
def _compiles_by_size() -> bool:
    return bool(triton.runtime.driver.active.get_current_target().backend == "hip")


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which the device of the tensor is the current one."""
    if _device_count() > 1 and tensor.get_device() != torch.accelerator.current_device_index():
        return torch.accelerator.device_index(tensor.get_device())
    return _HERE


def current_stream(device: int) -> int:
    """The stream that a kernel on the current device goes to: asked for here, where the device is known already."""
    return _stream_of_device()(device)


@functools.cache
def _stream_of_device() -> Callable[[int], int]:
    ask: Callable[[int], int] = triton.runtime.driver.active.get_current_stream
    return ask


@functools.cache
def _device_count() -> int:
    return torch.accelerator.device_count()
