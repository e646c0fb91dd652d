"""``turnout demo`` and ``turnout bench``. A function's signature is its options, one for one."""

from __future__ import annotations

import functools
import json as json_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

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
            _refuse(str(error), error)

        def report_step(step: str) -> None:
            progress.update(task, description=step)
            if not progress.console.is_terminal:  # rich draws nothing there
                _say(step)

        result = run_demo(demo, report_step)
    result.show(Console(stderr=json))
    if json:
        typer.echo(json_module.dumps(result.to_json()))


bench_app = typer.Typer(help="Kernel tables, for the record.", no_args_is_help=True)


@bench_app.command("routing")
def routing_command(
    json: Annotated[Path, typer.Option(help="File that the result is written to.")],
    vllm: Annotated[
        Path | None,
        typer.Option(help="Folder of the package vllm, of which one source file is read; else the installed one."),
    ] = None,
    num_experts: Annotated[int, typer.Option(min=1)] = 128,
    top_k: Annotated[int, typer.Option(min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: of the logits.")] = "float32",
    rounds: Annotated[int, typer.Option(min=2, help="Replays of each variant, in turns.")] = 25,
) -> None:
    """Routing alone on a CUDA device: turnout, vLLM's kernel, its cast and torch, in captured graphs."""
    from turnout.bench.routing import run, table
    from turnout.contracts import dtype_name
    from turnout.routing.api import LOGITS_DTYPES

    dtypes = {dtype_name(each): each for each in LOGITS_DTYPES}
    if dtype not in dtypes:
        _refuse(f"--dtype must be one of {', '.join(dtypes)}; got {dtype}")
    try:
        result = run(num_experts, top_k, dtypes[dtype], vllm, rounds)
    except (FileNotFoundError, ValueError) as error:
        _refuse(str(error), error)
    _write(json, result)
    typer.echo(table(result))


@bench_app.command("transformers")
def transformers_command(
    json: Annotated[Path, typer.Option(help="File that the result is written to, scenario by scenario.")],
    device: Annotated[str, typer.Option(help="cuda, xpu or cpu; the model takes 50 GB there.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Two small layers, to try the benchmark itself.")] = False,
    requests: Annotated[str, typer.Option(help="Requests at a time, with commas.")] = "1,16",
    prefill: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 128,
    decode: Annotated[int, typer.Option(min=1, help="Decode steps in a round.")] = 8,
    rounds: Annotated[int | None, typer.Option(min=2, help="Of each scenario; left out, 6 to 25 within 5 s.")] = None,
    compiled: Annotated[bool, typer.Option(help="Also under torch.compile with a static cache.")] = True,
) -> None:
    """A decode step of Gemma 4 26B-A4B with random weights in transformers: stock and turnout, eager and compiled."""
    from rich.console import Console

    from turnout.bench.whole_model import Settings, run, table

    try:
        settings = Settings(
            device=device,
            tiny=tiny,
            requests=_numbers("--requests", requests),
            prompt_tokens=prefill,
            decode=decode,
            rounds=rounds,
            compiled=compiled,
        )
        rows = run(settings, _say, functools.partial(_write, json))
    except ValueError as error:
        _refuse(str(error), error)
    Console(width=100).print(table(rows))


@bench_app.command("scenarios")
def scenarios_command(
    json: Annotated[Path, typer.Option(help="File that the result is written to, scenario by scenario.")],
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
    model: Annotated[
        str,
        typer.Option(help="tiny, gemma4-4-layers, gemma4-30-layers, gemma4-26b (vLLM alone), or a folder."),
    ] = "tiny",
    device: Annotated[str, typer.Option(help="auto (the accelerator, else the CPU), cpu, cuda.")] = "auto",
    consumer: Annotated[
        str, typer.Option(help="own: the engine's experts; int64: as vllm-xpu-kernels before v0.1.8, emulated.")
    ] = "own",
    layer: Annotated[bool, typer.Option("--layer", help="Also the plugin's mode 'layer'.")] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Without CUDA graphs.")] = False,
    requests: Annotated[str, typer.Option(help="Requests at a time, with commas.")] = "1,16",
    prefill: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 64,
    decode: Annotated[int, typer.Option(min=1, max=64, help="Decode steps in a round.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Of each variant, in turns.")] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; left out, 1 for the small models with names.")
    ] = None,
) -> None:
    """Prefill and decode in vLLM or transformers: stock and turnout in turns, in the columns of vLLM's PR 40565."""
    from rich.console import Console

    from turnout.bench.scenario_bench import run
    from turnout.bench.scenario_result import Result, Settings

    def write(result: Result) -> None:
        _write(json, result.to_json())

    try:
        settings = Settings(
            engine=engine,
            model=model,
            device=device,
            consumer=consumer,
            layer=layer,
            eager=eager,
            requests=_numbers("--requests", requests),
            prefill=prefill,
            decode=decode,
            rounds=rounds,
            threads=threads,
        )
        result = run(settings, _say, write)
    except ValueError as error:
        _refuse(str(error), error)
    result.show(Console(width=130))


@bench_app.command("layer")
def layer_command(
    json: Annotated[Path, typer.Option(help="File that the result is written to, row by row.")],
    rounds: Annotated[int, typer.Option(min=2, help="Replays of each variant, in turns.")] = 20,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, with commas.")] = "1,2,4,8,16,32,64,128,256,1024,4096",
    layers: Annotated[int, typer.Option(min=1, help="Layers whose weights the calls rotate through.")] = 12,
    routing: Annotated[str, typer.Option(help="uniform, skewed or one_hot.")] = "uniform",
    vllm_site: Annotated[
        Path | None, typer.Option(help="Folder to import vLLM from; left out, where Python finds it.")
    ] = None,
    num_experts: Annotated[int, typer.Option(min=1)] = 128,
    top_k: Annotated[int, typer.Option(min=1)] = 8,
    hidden_size: Annotated[int, typer.Option(min=1)] = 2816,
    intermediate_size: Annotated[int, typer.Option(min=1)] = 704,
    activation: Annotated[str, typer.Option(help="silu, gelu or gelu_tanh.")] = "gelu_tanh",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16: of hidden states and weights.")] = "bfloat16",
) -> None:
    """A layer from router logits to output on a CUDA device: turnout, vLLM and transformers, in captured graphs."""
    from turnout.bench.layer import Settings, run, table
    from turnout.bench.layer_case import Geometry

    try:
        geometry = Geometry(
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            activation=activation,
            dtype=dtype,
        )
        settings = Settings(
            geometry=geometry,
            num_tokens=_numbers("--tokens", tokens),
            routing=routing,
            layers=layers,
            rounds=rounds,
            vllm_site=vllm_site,
        )
        result = run(settings, functools.partial(_write, json), _say)
    except ValueError as error:
        _refuse(str(error), error)
    typer.echo(table(result))


def _say(step: str) -> None:
    typer.echo(step, err=True)


def _write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json_module.dumps(result, indent=1) + "\n")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() and int(number) for number in numbers):
        raise ValueError(f"{option} must be numbers with commas between; got {text}")
    return tuple(int(number) for number in numbers)


def _refuse(message: str, cause: Exception | None = None) -> NoReturn:
    typer.echo(f"turnout: {message}", err=True)
    raise typer.Exit(2) from cause
