"""``turnout demo``. The function's signature is its options, one for one."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer


def demo_command(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of any Gemma 4 with experts; the tiny one if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (the accelerator, else the CPU), cpu, cuda, xpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32: of the timed model.")] = "bfloat16",
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    decode: Annotated[int, typer.Option(min=1, help="Decode steps in a round.")] = 16,
    repeat: Annotated[
        int | None, typer.Option(min=2, help="Rounds of each scenario; left out, 6 to 25 within 5 s.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also under torch.compile: five minutes more on a CPU.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; left out, 1 for the tiny model, else torch's default.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one line of JSON to stdout, all else to stderr.")
    ] = False,
) -> None:
    """Run a Gemma 4 stock and with turnout, and print the table of vLLM's PR 40565 before and after."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    errors = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("loading")
        from turnout.bench.demo import open_demo, run_demo
        from turnout.bench.demo_result import Settings

        settings = Settings(
            model=model,
            device=device,
            dtype=dtype,
            prefill=prefill,
            decode=decode,
            repeat=repeat,
            compiled=compiled,
            threads=threads,
        )
        try:
            demo = open_demo(settings)
        except ValueError as error:
            progress.stop()
            typer.echo(f"turnout: {error}", err=True)
            raise typer.Exit(2) from error
        result = run_demo(demo, lambda step: progress.update(task, description=step))
    result.show(Console(stderr=json))
    if json:
        typer.echo(json_module.dumps(result.to_json()))
