"""The audit's front door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from turnout.audit.device_time import DeviceTime
    from turnout.audit.regions import Region
    from turnout.audit.report import AuditReport


def audit(fn_or_model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> AuditReport:
    """Call a function or a model once and report every copy that it made, and which of them it did not need.

    An exception that the program raises ends the recording; the report covers what ran before and carries the
    error in `AuditReport.error`. Gradient mode is the caller's.

    Args:
        fn_or_model: anything callable; for a module the report uses its submodules' names.
        *args: passed on.
        **kwargs: passed on.

    Returns:
        The report; for a model with experts it has the regions "routing" and "experts".

    Raises:
        TypeError: `fn_or_model` cannot be called.

    Examples:
        >>> import torch
        >>> report = audit(lambda x: (x * 2).clone() + 1, torch.ones(4))
        >>> [(finding.kind.value, finding.op) for finding in report.findings]
        [('layout', 'aten.clone.default')]
    """
    return _audit(fn_or_model, args, kwargs)


def audit_calls(
    fn: Callable[..., Any],
    /,
    *args: Any,
    regions: Sequence[Region] | None = None,
    device_time: str | None = None,
    **kwargs: Any,
) -> AuditReport:
    """As `audit`, with named regions and device time; `fn` must have no arguments of those names.

    Args:
        fn: anything callable.
        *args: passed on.
        regions: named parts; None for the routing and experts of a Mixture-of-Experts model.
        device_time: a device type, such as "cpu" or "cuda": call once to warm up and once more under the
            profiler, and add what copies cost there.
        **kwargs: passed on.

    Raises:
        TypeError: `fn` cannot be called.
        ValueError: torch.profiler measures no such device type.
    """
    return _audit(fn, args, kwargs, regions=regions, device_time=device_time)


def _audit(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    regions: Sequence[Region] | None = None,
    device_time: str | None = None,
) -> AuditReport:
    from turnout.audit.build import build_report
    from turnout.audit.recorder import Recorder

    if not callable(fn):
        raise TypeError(
            f"audit wants a callable or a torch.nn.Module, got {type(fn).__name__}; pass the function itself, then "
            "its arguments: audit(fn, x)"
        )
    root = root_of(fn)
    recorder = Recorder(root)
    with suppress(Exception):  # whatever the program raises: the recorder holds it, the report shows it
        recorder.run("call", fn, *args, **kwargs)
    report = build_report(recorder, name_of_target(fn), default_regions(root) if regions is None else regions)
    if device_time is not None and not report.error:
        from turnout.audit.device_time import measure

        fn(*args, **kwargs)
        report.device_time = measure({"call": [lambda: fn(*args, **kwargs)]}, root, device_time)
    return report


def audit_decoder(
    model: torch.nn.Module,
    *,
    prefill: int = 64,
    decode: int = 4,
    concurrency: int = 1,
    regions: Sequence[Region] | None = None,
    device_time: bool = False,
) -> AuditReport:
    """Audit a causal language model: one prefill, then single-token steps on its cache.

    Args:
        model: a transformers-style causal model: ``model(input_ids=, past_key_values=, use_cache=)`` returning
            ``logits`` and ``past_key_values``.
        prefill: prompt tokens per sequence; the ids are random, from a fixed seed.
        decode: single-token steps after it.
        concurrency: sequences in the batch.
        regions: named parts; None for the routing and experts of a Mixture-of-Experts model.
        device_time: run once more under the profiler and add what copies cost.

    Raises:
        ValueError: fewer than one prompt token or sequence, or a negative number of steps.
    """
    from turnout.audit.build import build_report
    from turnout.audit.decoder import Steps
    from turnout.audit.recorder import Recorder

    if prefill < 1 or concurrency < 1 or decode < 0:
        raise ValueError(f"prefill and concurrency must be at least 1 and decode at least 0, got prefill={prefill}, "
                         f"concurrency={concurrency}, decode={decode}")  # fmt: skip
    import torch

    regions = default_regions(model) if regions is None else regions
    steps = Steps(model, prefill=prefill, concurrency=concurrency)
    recorder = Recorder(model)
    with torch.no_grad(), suppress(Exception):  # the recorder holds the error, the report shows it
        recorder.run("prefill", steps.first)
        for _ in range(decode):
            recorder.run("decode", steps.next)
    report = build_report(recorder, f"{type(model).__name__}, {concurrency} x {prefill} tokens", regions)
    if device_time and not report.error:
        report.device_time = _time_decoder(model, prefill=prefill, decode=decode, concurrency=concurrency)
    return report


def _time_decoder(model: torch.nn.Module, *, prefill: int, decode: int, concurrency: int) -> DeviceTime:
    import torch

    from turnout.audit.decoder import Steps
    from turnout.audit.device_time import measure

    warm, steps = (Steps(model, prefill=prefill, concurrency=concurrency) for _ in range(2))
    with torch.no_grad():
        warm.first()
        warm.next()
        phases: dict[str, list[Callable[[], Any]]] = {"prefill": [steps.first]}
        if decode:
            phases["decode"] = [steps.next] * decode
        return measure(phases, model, next(model.parameters()).device.type)


def root_of(fn: Callable[..., Any]) -> torch.nn.Module | None:
    """The module that a callable is, or is a method of; None for a plain function."""
    import torch

    owner = getattr(fn, "__self__", fn)
    return owner if isinstance(owner, torch.nn.Module) else None


def name_of_target(fn: Callable[..., Any]) -> str:
    """What a report calls a callable."""
    return getattr(fn, "__qualname__", None) or type(fn).__name__


def default_regions(root: torch.nn.Module | None) -> tuple[Region, ...]:
    """The regions that a report has without being asked."""
    from turnout.audit.regions import moe_regions

    return () if root is None else moe_regions(root)
