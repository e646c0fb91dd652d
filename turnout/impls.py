"""Implementations of the stations: how one is chosen, found and told what it was given."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Choice(NamedTuple):
    """An implementation, and why it was chosen."""

    impl: str
    reason: str


@functools.cache
def module_of(room: str, impl: str) -> object:
    """The module ``turnout.<room>.<impl>``; kernels are imported at their first use.

    Raises:
        ImportError: the implementation needs triton, and that is not installed.
    """
    try:
        return importlib.import_module(f"turnout.{room}.{impl}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(f"impl={impl!r} needs the triton package: pip install 'turnout[triton]'") from error


@functools.cache
def launch_of(room: str, impl: str, name: str = "launch") -> Callable[..., None]:
    """The function of an implementation that writes into the caller's buffers."""
    launch: Callable[..., None] = getattr(module_of(room, impl), name)
    return launch


def check_impl(impl: str, impls: tuple[str, ...]) -> None:
    """Refuse a name that is no implementation."""
    if impl not in impls:
        raise ValueError(f"impl must be one of auto, {', '.join(impls)}; got {impl!r}")


def check_grad(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that autograd would follow."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, and turnout computes for inference only: call it under torch.no_grad(), "
            "or detach the tensor"
        )


def check_kind(name: str, value: object, kind: type) -> None:
    """Refuse what is not of its type."""
    if not isinstance(value, kind):
        article = "a tensor" if kind is torch.Tensor else f"a turnout.{kind.__name__}"
        raise TypeError(f"{name} must be {article}, got {type(value).__name__}")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    beside: tuple[str, torch.Tensor],
) -> None:
    """Refuse a tensor that is not contiguous, or not of this shape, one of these dtypes and the device of another.

    Args:
        name: what the message calls it.
        tensor: to check.
        shape: wanted; None: any size.
        dtypes: allowed.
        beside: name of the tensor whose device is wanted, and that tensor.

    Raises:
        TypeError: not a tensor.
        ValueError: as said above, or it requires grad.
    """
    if (
        isinstance(tensor, torch.Tensor)
        and tensor.shape == shape
        and tensor.dtype in dtypes
        and tensor.device == beside[1].device
        and tensor.is_contiguous()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    ):
        return  # as good as always, and at every call
    check_kind(name, tensor, torch.Tensor)
    if tensor.dtype not in dtypes or not _has_shape(tensor, shape):
        wanted = f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
        raise ValueError(
            f"{name} must be {wanted} of {' or '.join(map(str, dtypes))}, got {list(tensor.shape)} of {tensor.dtype}"
        )
    if tensor.device != beside[1].device:
        raise ValueError(f"{name} is on {tensor.device}, {beside[0]} on {beside[1].device}; move one of them")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {tensor.stride()}; pass {name}.contiguous() if the copy is meant"
        )
    check_grad(name, tensor)


def _has_shape(tensor: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    return tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )


def check_apart(out: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    """Refuse a buffer [T, H] that shares memory with a tensor [rows, H] that is read while it is written."""
    start, end = _span(tensor)
    out_start, out_end = _span(out)
    if out_start < end and start < out_end:
        raise ValueError(f"out overlaps {name}, which is read while out is written; pass another buffer")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses between which a tensor [rows, columns] lies."""
    rows, columns = tensor.shape
    if tensor.numel() == 0:
        return 0, 0
    start = tensor.data_ptr()
    return start, start + ((rows - 1) * tensor.stride(0) + columns) * tensor.element_size()


def check_hidden_states(hidden_states: torch.Tensor) -> None:
    """Refuse what is no [T, H] of floats."""
    check_kind("hidden_states", hidden_states, torch.Tensor)
    if hidden_states.dim() != 2:
        raise ValueError(
            f"hidden_states must be [T, H], got shape {list(hidden_states.shape)}; flatten leading dimensions with "
            "hidden_states.view(-1, hidden_states.shape[-1])"
        )
    if hidden_states.dtype not in FLOAT_DTYPES:
        raise ValueError(f"hidden_states must be float32, bfloat16 or float16, got {hidden_states.dtype}")


def check_readable(hidden_states: torch.Tensor) -> None:
    """Refuse hidden states whose rows a kernel cannot read, or that autograd would follow."""
    if hidden_states.stride(1) != 1 and hidden_states.shape[1] > 1:
        raise ValueError(
            f"hidden_states must have contiguous rows, got strides {hidden_states.stride()}; rows may lie apart, "
            "columns may not: pass hidden_states.contiguous() if the copy is meant"
        )
    check_grad("hidden_states", hidden_states)
