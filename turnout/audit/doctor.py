"""``turnout doctor``: what is here, what turnout would change in a model and in vLLM, and what that gains here."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import turnout
from turnout.audit.api import audit_decoder, default_regions
from turnout.audit.build import environment
from turnout.audit.decoder import Steps
from turnout.audit.models import load
from turnout.audit.report import AuditReport
from turnout.integrations._vllm_doctor import PluginDiagnosis
from turnout.machine import version

_PACKAGES = ("triton", "transformers", "vllm", "numba")
_PROMPT = 16
_STEPS = 15


@dataclass(frozen=True, slots=True)
class Effect:
    """What `turnout.apply` does to one decode step of a model, measured here.

    Attributes:
        redundant: redundant copies from router logits to the output of the experts, before and after.
        operators: operators in all, before and after.
        step_ms: median milliseconds of a step, before and after, taken in turns.
        spread_ms: interquartile range of the paired differences.
    """

    redundant: tuple[int, int]
    operators: tuple[int, int]
    step_ms: tuple[float, float]
    spread_ms: float

    @property
    def gain(self) -> str:
        """The gain in words; says so where there is none, or a loss."""
        before, after = self.step_ms
        gained = before - after
        times = f"{before:.2f} ms -> {after:.2f} ms per decode step (differences spread over {self.spread_ms:.2f} ms)"
        if abs(gained) <= self.spread_ms:
            return f"no gain here that can be told from noise: {times}"
        if gained < 0:
            return f"slower here: {times}"
        return f"{gained / before:.0%} of a decode step: {times}"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        environment: versions and hardware.
        model: the model's name, or "" if none was given.
        layers: what `turnout.explain` says of the model; "" where no router beside its experts was found.
        effect: measured change; None where nothing would change.
        verdict: one sentence.
    """

    environment: dict[str, str]
    model: str
    layers: str
    effect: Effect | None
    verdict: str


def examine(name: str | None) -> Diagnosis:
    """Examine this machine and, if named, a model on it.

    Args:
        name: as for `turnout audit --model`; None to look at the machine only.

    Raises:
        ValueError: the model cannot be loaded.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = "cpu" if accelerator is None else accelerator.type
    here = {**environment(device), **{package: _version(package) for package in _PACKAGES}}
    if name is None:
        return Diagnosis(here, "", "", None, "Pass --model to see what would change in one.")
    model = load(name, dtype=torch.bfloat16, device=device)
    if not default_regions(model):
        verdict = "No gain here: no router (or gate) beside a module called experts was found in the model."
        return Diagnosis(here, name, "", None, verdict)
    layers = turnout.explain(model)
    routers = sum(row.router.contract is not None for row in layers)
    experts = sum(row.experts.spec is not None for row in layers)
    if not routers and not experts:
        return Diagnosis(here, name, str(layers), None, "No gain here: turnout replaces nothing in this model yet.")
    effect = _measure(model)
    verdict = f"turnout.apply replaces {routers} routers and {experts} experts of {len(layers)} layers: {effect.gain}."
    return Diagnosis(here, name, str(layers), effect, verdict)


def show_plugin(plugin: PluginDiagnosis | None, console: Console | None = None) -> None:
    """Print what there is to say of the plugin in vLLM.

    Args:
        plugin: what `examine_plugin` returned.
        console: where to; standard output unless given.
    """
    console = console or Console()
    if plugin is None:
        console.print(Text("vLLM is not installed here; turnout would be its plugin."))
        return
    table = Table(title="The plugin in vLLM", title_justify="left", show_header=False, show_lines=True)
    for key, value in plugin.found.items():
        table.add_row(key, Text(value))
    console.print(table)
    for problem in plugin.problems:
        console.print(Text(f"The plugin does not work: {problem}", style="bold"))


def show(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Print a diagnosis.

    Args:
        diagnosis: what `examine` returned.
        console: where to; standard output unless given.
    """
    console = console or Console()
    table = Table(title="Here", title_justify="left", show_header=False)
    for key, value in diagnosis.environment.items():
        table.add_row(key, value)
    console.print(table)
    if diagnosis.layers:
        console.print(Text(f"\n{diagnosis.model}: {diagnosis.layers}\n"))
    effect = diagnosis.effect
    if effect is not None:
        changes = Table(title="One decode step with turnout.apply", title_justify="left")
        for column in ("", "before", "after"):
            changes.add_column(column, justify="right" if column else "left")
        changes.add_row("redundant copies, logits to layer output", *map(str, effect.redundant))
        changes.add_row("operators", *map(str, effect.operators))
        changes.add_row("milliseconds", *(f"{ms:.2f}" for ms in effect.step_ms))
        console.print(changes)
    console.print(Text(diagnosis.verdict, style="bold"))


def _version(package: str) -> str:
    """Of the package, or of its build for CPUs, which has a name of its own in vLLM's case."""
    return version(package) or version(f"{package}-cpu") or "not installed"


def _measure(model: torch.nn.Module) -> Effect:
    before = audit_decoder(model, prefill=_PROMPT, decode=1)
    turnout.apply(model)
    after = audit_decoder(model, prefill=_PROMPT, decode=1)
    turnout.restore(model)
    pairs = _step_times(model)
    differences = statistics.quantiles([stock - ours for stock, ours in pairs], n=4)
    medians = (statistics.median(stock for stock, _ in pairs), statistics.median(ours for _, ours in pairs))
    return Effect(
        redundant=(_redundant(before), _redundant(after)),
        operators=(_operators(before), _operators(after)),
        step_ms=medians,
        spread_ms=differences[2] - differences[0],
    )


def _redundant(report: AuditReport) -> int:
    regions = ("routing", "experts")
    return sum(f.count for region in regions for f in report.redundant(region) if f.phase == "decode")


def _operators(report: AuditReport) -> int:
    return next(phase.operators for phase in report.phases if phase.name == "decode")


def _step_times(model: torch.nn.Module) -> list[tuple[float, float]]:
    """Milliseconds of a decode step, stock and applied in turns, so that a drift of the machine hits both."""
    pairs = []
    with torch.no_grad():
        stock, ours = (Steps(model, prefill=_PROMPT, concurrency=1) for _ in range(2))
        stock.first()
        ours.first()
        for _ in range(_STEPS):
            stock_ms = _timed(stock.next)
            turnout.apply(model)
            ours_ms = _timed(ours.next)
            turnout.restore(model)
            pairs.append((stock_ms, ours_ms))
    return pairs[3:]  # the first steps compile and warm up


def _timed(step: Any) -> float:
    begin = time.perf_counter()
    step()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return (time.perf_counter() - begin) * 1e3
