"""Which conversions between dtypes keep every value."""

from __future__ import annotations

from functools import cache

import torch


def _is_integer(dtype: torch.dtype) -> bool:
    return dtype != torch.bool and not dtype.is_floating_point and not dtype.is_complex


@cache
def keeps_every_value(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether each value that `source` can hold exists in `target`.

    Examples:
        >>> keeps_every_value(torch.bfloat16, torch.float32), keeps_every_value(torch.float32, torch.bfloat16)
        (True, False)
        >>> keeps_every_value(torch.int32, torch.int64), keeps_every_value(torch.int64, torch.float32)
        (True, False)
        >>> keeps_every_value(torch.bfloat16, torch.float16)
        False
    """
    if source == target or source == torch.bool:
        return True
    if target == torch.bool or source.is_complex:
        return source.is_complex and target.is_complex and target.itemsize >= source.itemsize
    if target.is_complex:
        return keeps_every_value(source, target.to_real())
    if source.is_floating_point:
        return target.is_floating_point and _float_fits(torch.finfo(source), torch.finfo(target))
    info = torch.iinfo(source)
    if _is_integer(target):
        wider = torch.iinfo(target)
        return wider.min <= info.min and info.max <= wider.max
    return info.max <= largest_exact_integer(target)


def _float_fits(source: torch.finfo, target: torch.finfo) -> bool:
    finer = target.eps <= source.eps and target.max >= source.max
    return finer and target.smallest_normal * target.eps <= source.smallest_normal * source.eps


def largest_exact_integer(dtype: torch.dtype) -> int:
    """Largest n such that a floating `dtype` holds every integer of magnitude up to n."""
    return round(2 / torch.finfo(dtype).eps)


def may_keep_values(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a look at the values can show that a conversion the dtypes do not vouch for kept them all.

    Integers only: ids that fit. A float rounded to fewer bits is rounding, even where a run needed none.
    """
    return _is_integer(source) and target != torch.bool and not target.is_complex


def kept_values(values: torch.Tensor, target: torch.dtype) -> bool | None:
    """Whether the integers in `values` all exist in `target`; None where there are no values to look at.

    Args:
        values: integer tensor, any shape.
        target: an integer or floating dtype.
    """
    if values.device.type == "meta" or type(values) is not torch.Tensor:
        return None  # meta tensors have no values, and a subclass may answer with something else than numbers
    if values.numel() == 0:
        return True
    low, high = int(values.min()), int(values.max())
    if target.is_floating_point:
        limit = largest_exact_integer(target)
        return -limit <= low and high <= limit
    info = torch.iinfo(target)
    return info.min <= low and high <= info.max


def short_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
