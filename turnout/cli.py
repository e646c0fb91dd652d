"""The command line. A command's body lives in its room; that of the catalogue, which has none, here."""

from __future__ import annotations

import dataclasses
import json as json_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turnout._version import __version__
from turnout.audit.cli import audit_command, doctor_command
from turnout.bench.cli import bench_app, demo_command

if TYPE_CHECKING:
    from rich.table import Table

    from turnout.contracts import CatalogueEntry

WIDTH_OF_FILES = 160  # characters in a line where no terminal sets the width


def contracts_command(
    name: Annotated[str | None, typer.Argument(help="A consumer, to see its entry whole.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False,
) -> None:
    """List the known consumers of routing, and the form that each of them reads."""
    from rich.console import Console

    from turnout.contracts import contracts

    try:
        entries = [contracts.entry(each) for each in (contracts if name is None else [name])]
    except KeyError as error:
        typer.echo(f"turnout: {error.args[0]}", err=True)
        raise typer.Exit(2) from error
    if json:
        typer.echo(json_module.dumps([entry_json(entry) for entry in entries], indent=2))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = WIDTH_OF_FILES
        console.print(_catalogue_table(entries, console.width) if name is None else _entry_table(entries[0]))


def entry_json(entry: CatalogueEntry) -> dict[str, Any]:
    """An entry as JSON values: its fields, the contract's beside them, dtypes by name."""
    from turnout.contracts import dtype_name

    fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    contract = fields.pop("contract")
    fields |= {field.name: getattr(contract, field.name) for field in dataclasses.fields(contract) if field.init}
    fields["also_accepts"] = [dtype_name(dtype) for dtype in entry.also_accepts]
    return fields | {each: dtype_name(fields[each]) for each in ("ids_dtype", "weights_dtype", "structures_dtype")}


def _catalogue_table(entries: list[CatalogueEntry], width: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), show_lines=True)
    name_width = max(len(entry.name) for entry in entries) if width >= WIDTH_OF_FILES else width // 4
    table.add_column("consumer\n[dim]source[/dim]", overflow="fold", width=name_width)
    for heading in ("ids", "weights", "senti-\nnel", "id\nspace"):
        table.add_column(heading, overflow="fold", min_width=len(heading.split("\n")[0]))
    for heading in ("structures", "versions", "evi-\ndence"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        row = entry_json(entry)
        keys = ("ids_dtype", "weights_dtype", "sentinel", "id_space", "structures", "versions", "evidence")
        table.add_row(f"{entry.name}\n[dim]{entry.repository} {entry.path}[/dim]", *(_text(row[key]) for key in keys))
    return table


def _entry_table(entry: CatalogueEntry) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for field, value in entry_json(entry).items():
        table.add_row(f"[bold]{field}[/bold]", _text(value))
    return table


def _text(value: object) -> str:
    from rich.markup import escape

    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return "-" if value is None or not text else escape(text)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"turnout {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Mixture-of-Experts routing that writes every intermediate in the form its consumer reads."""


app = typer.Typer(
    name="turnout",
    callback=_options,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo_command)
app.command("contracts")(contracts_command)
app.command("audit")(audit_command)
app.command("doctor")(doctor_command)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line."""
    app(prog_name="turnout")
