"""Questions about strides: may one view stand in for another, and do two views share elements."""

from __future__ import annotations

from dataclasses import replace

import torch

from turnout.audit.graph import View

_MOST_ELEMENTS_COMPARED = 1 << 20


def same_layout(a: View, b: View) -> bool:
    """Whether two views have equal shapes and strides, dimensions of size one aside."""
    if a.shape != b.shape:
        return False
    if a.numel == 0:
        return True
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride, b.stride, strict=True))


def is_whole(copy: View, wanted: View) -> bool:
    """Whether `wanted` shows all of `copy` in row-major order: the copy itself, or a reshape of it."""
    if wanted.shape == copy.shape and wanted.stride == copy.stride:
        return wanted.offset == copy.offset
    return copy.is_contiguous and wanted.is_contiguous and wanted.numel == copy.numel


def as_view_of(source: View, copy: View, wanted: View) -> View | None:
    """The view of `source` that shows what `wanted` shows of its copy, or None where no strides express it.

    Args:
        source: what was copied.
        copy: the copy, shaped like `source`.
        wanted: a view of the copy for which `is_whole` holds.
    """
    stride = source.stride
    if wanted.shape != copy.shape:
        try:
            stride = tuple(torch.empty_strided(source.shape, stride, device="meta").view(wanted.shape).stride())
        except RuntimeError:  # torch's way of saying that no strides express this shape
            return None
    return replace(source, shape=wanted.shape, stride=stride)


def gemm_reads(view: View) -> bool:
    """Whether a matrix product reads the view as it is: one of the last two strides 1, the other a row length."""
    if len(view.shape) < 2:
        return True
    (rows, columns), (row, column) = view.shape[-2:], view.stride[-2:]
    return (column == 1 and row >= max(columns, 1)) or (row == 1 and column >= max(rows, 1))


def overlap(a: View, b: View) -> bool | None:
    """Whether two views share an element; None where that is too dear to find out."""
    if not (a.is_strided and b.is_strided):
        return None if a.storage == b.storage else False
    if a.storage != b.storage or a.numel == 0 or b.numel == 0:
        return False
    (a_low, a_high), (b_low, b_high) = _extent(a), _extent(b)
    if a_high <= b_low or b_high <= a_low:
        return False
    if (a.is_contiguous and a_low <= b_low) or (b.is_contiguous and b_low <= a_low):
        return True  # the other's first element lies within the dense one
    if a.dtype.itemsize != b.dtype.itemsize or max(a.numel, b.numel) > _MOST_ELEMENTS_COMPARED:
        return None
    return bool(torch.isin(_positions(a), _positions(b)).any())


def _extent(view: View) -> tuple[int, int]:
    """First byte and one past the last byte."""
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
    return view.offset * view.dtype.itemsize, (last + 1) * view.dtype.itemsize


def _positions(view: View) -> torch.Tensor:
    positions = torch.tensor([view.offset])
    for size, stride in zip(view.shape, view.stride, strict=True):
        positions = (positions[:, None] + torch.arange(size) * stride).flatten()
    return positions
