"""``turnout audit`` and ``turnout doctor``. The functions' signatures are their options, one for one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from turnout.audit.regions import Region
    from turnout.audit.report import AuditReport

# What each way of calling `turnout audit` reads; the rest is refused, so that no option is lost in silence.
_OF_EVERY_AUDIT = {"device", "region", "time", "json", "html", "fail_over", "budget_region"}
_READ_BY = {
    "model": {"model", "prefill", "decode", "concurrency", "dtype", "experts", "apply", *_OF_EVERY_AUDIT},
    "module": {"module", *_OF_EVERY_AUDIT},
    "compare": {"compare", "html"},
}

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Checkpoint folder, model id, or tiny, tiny-mixtral, tiny-qwen3-moe."),
]


def audit_command(
    context: typer.Context,
    model: ModelOption = None,
    module: Annotated[
        str | None, typer.Option(help="pkg.mod:callable, called without arguments, in place of a model.")
    ] = None,
    prefill: Annotated[int, typer.Option(min=1, help="Prompt tokens per sequence.")] = 64,
    decode: Annotated[int, typer.Option(min=0, help="Single-token steps after the prompt.")] = 4,
    concurrency: Annotated[int, typer.Option(min=1, help="Sequences in the batch.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, xpu.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "bfloat16",
    experts: Annotated[
        str | None, typer.Option(help="transformers experts implementation: eager, batched_mm, grouped_mm.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Audit the model after turnout.apply.")] = False,
    region: Annotated[
        list[str] | None, typer.Option(help="NAME=START[..STOP], see docs/AUDIT.md; may be repeated.")
    ] = None,
    time: Annotated[bool, typer.Option("--time", help="Also measure device time.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report here as a web page.")] = None,
    fail_over: Annotated[
        int | None, typer.Option(min=0, help="Exit 1 if there are more redundant copies than this.")
    ] = None,
    budget_region: Annotated[str | None, typer.Option(help="Count only this region's copies for --fail-over.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two JSON reports, before and after, in place of an audit.")
    ] = None,
) -> None:
    """Find the copies that a model or function makes and does not need."""
    try:
        _check(context, json, html)
        if compare is not None:
            _compare(compare, html)
            return
        named = _regions(region)
        if module is not None:
            fn = _callable(module, device)
            _check_budget(fail_over, budget_region, named)
            report = _audit_callable(fn, named, device if time else None)
        else:
            loaded = _load(str(model), dtype=dtype, device=device, experts=experts, apply=apply)
            named = (*_regions_of(loaded), *named)
            _check_budget(fail_over, budget_region, named)
            report = _audit_model(loaded, named, (prefill, decode, concurrency), time)
            report.target += ", turnout applied" if apply else ""
        _write(report, json, html)
        over = fail_over is not None and not report.error and report.over_budget(fail_over, budget_region) > 0
    except (OSError, ValueError) as error:
        _refuse(str(error))
    if over:
        where = f" in {budget_region}" if budget_region else ""
        count = report.redundant_count(budget_region)
        typer.echo(f"over budget: {count} redundant copies{where}, allowed {fail_over}", err=True)
    if over or report.error:
        raise typer.Exit(1)


def doctor_command(model: ModelOption = None) -> None:
    """Say what turnout finds on this machine, in a model and in vLLM, what it would change, and what that would gain.

    Exits with 1 if vLLM is installed and the plugin would not work in it.
    """
    from turnout.audit.doctor import examine, show, show_plugin
    from turnout.integrations._vllm_doctor import examine_plugin

    try:
        show(examine(model))
        plugin = examine_plugin()
        show_plugin(plugin)
    except ValueError as error:
        _refuse(str(error))
    if plugin is not None and plugin.problems:
        raise typer.Exit(1)


def _check(context: typer.Context, *files: Path | None) -> None:
    """Refuse options that the chosen way of calling does not read, and files that could not be written."""
    given = {p.name: p.opts[0] for p in context.command.params if _is_given(context, p.name)}
    chosen = [way for way in _READ_BY if way in given]
    if len(chosen) != 1:
        raise ValueError("give exactly one of --model, --module and --compare")
    unread = [option for name, option in given.items() if name not in _READ_BY[chosen[0]]]
    if unread:
        raise ValueError(f"--{chosen[0]} does not read {', '.join(unread)}; leave that out")
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"there is no folder {str(file.parent)!r} to write {file.name} in; make it first")


def _is_given(context: typer.Context, name: str | None) -> bool:
    source = context.get_parameter_source(name or "")
    return source is not None and source.name == "COMMANDLINE"


def _check_budget(fail_over: int | None, budget_region: str | None, regions: tuple[Region, ...]) -> None:
    if budget_region is None:
        return
    names = [region.name for region in regions]
    if fail_over is None:
        raise ValueError("--budget-region names where --fail-over counts; give --fail-over N too")
    if budget_region not in names:
        raise ValueError(f"no region {budget_region!r} for --budget-region; there are: {', '.join(names) or 'none'}")


def _load(name: str, *, dtype: str, device: str, experts: str | None, apply: bool) -> Any:
    import torch

    from turnout.audit.models import load

    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype):
        raise ValueError(f"--dtype {dtype!r} is no torch dtype; pass bfloat16, float16 or float32")
    model = load(name, dtype=wanted, device=device, experts=experts)
    if apply:
        from turnout.integrations.transformers import apply as apply_turnout

        try:
            apply_turnout(model)
        except NotImplementedError as error:
            raise ValueError(f"--apply: {error}") from error
    return model


def _regions(texts: list[str] | None) -> tuple[Region, ...]:
    from turnout.audit.regions import Region

    return tuple(Region.parse(text) for text in texts or ())


def _regions_of(model: Any) -> tuple[Region, ...]:
    from turnout.audit.api import default_regions

    return default_regions(model)


def _audit_model(model: Any, regions: tuple[Region, ...], sizes: tuple[int, int, int], time: bool) -> AuditReport:
    from turnout.audit.api import audit_decoder

    prefill, decode, concurrency = sizes
    return audit_decoder(
        model, prefill=prefill, decode=decode, concurrency=concurrency, regions=regions, device_time=time
    )


def _audit_callable(fn: Callable[[], Any], regions: tuple[Region, ...], device_time: str | None) -> AuditReport:
    from turnout.audit.api import audit_calls

    return audit_calls(fn, regions=regions, device_time=device_time)


def _callable(name: str, device: str) -> Callable[[], Any]:
    from turnout.machine import find_device

    find_device(device)
    path, colon, attribute = name.partition(":")
    if not (path and colon and attribute):
        raise ValueError(f"--module must be pkg.mod:callable, got {name!r}")
    try:
        fn = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--module {name!r}: {error}; give an importable module and a name in it") from error
    if not callable(fn):
        raise ValueError(f"--module {name!r} is a {type(fn).__name__}, not a callable; name a function to call")
    return fn  # type: ignore[no-any-return]


def _compare(files: tuple[Path, Path], html: Path | None) -> None:
    from rich.console import Console

    from turnout.audit.compare import table
    from turnout.audit.report import AuditReport

    before, after = (AuditReport.from_json(path.read_text(encoding="utf-8")) for path in files)
    Console().print(table(before, after))
    if html is not None:
        from turnout.audit.html import comparison_page

        html.write_text(comparison_page(before, after), encoding="utf-8")


def _write(report: AuditReport, json: Path | None, html: Path | None) -> None:
    report.print()
    if json is not None:
        report.to_json(json)
    if html is not None:
        report.to_html(html)


def _refuse(message: str) -> None:
    typer.echo(f"turnout: {message}", err=True)
    raise typer.Exit(2)
