"""``turnout bench scenarios``: prefill and decode in vLLM or transformers, stock and turnout in turns, in one table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from turnout.bench.profile import copies_inside, ids_casts, kernels
from turnout.bench.scenario_models import find_checkpoint, read_vocab_size
from turnout.bench.scenario_result import Further, Result, Settings
from turnout.bench.scenarios import Row, Runner, Scenario, measure
from turnout.machine import accelerator, find_device, profiler_activities

Report = Callable[[str], None]


class Engine(Protocol):
    """A loaded model in several variants, stock first."""

    device: torch.device

    @property
    def variants(self) -> Iterable[str]:
        """Their names, stock first."""

    @property
    def top_k(self) -> int:
        """Experts of a token."""

    def model(self, variant: str) -> torch.nn.Module | None:
        """What computes a forward; None where it is not called, since a device graph is replayed."""

    def runner(self, variant: str, scenario: Scenario) -> Runner:
        """The runner of a variant in a scenario."""

    def check(self) -> dict[str, Any]:
        """Compare the variants' answers; findings as JSON values, with ``balance``.

        Raises:
            RuntimeError: they do not agree; nothing is timed then.
        """

    def plan(self) -> list[str]:
        """What turnout does, a line for each layer."""


@torch.no_grad()
def run(settings: Settings, report_step: Report, write: Callable[[Result], None]) -> Result:
    """Load the model, compare the variants' answers, then measure every scenario.

    Args:
        settings: what to run.
        report_step: called with a few words at the start of each step.
        write: called with what there is after each scenario.

    Raises:
        ValueError: a setting that cannot be honoured.
        RuntimeError: the variants do not agree; nothing is timed then.
    """
    device = find_device(settings.device) if settings.device != "auto" else accelerator() or torch.device("cpu")
    profiler_activities(device.type)  # refuses a device that cannot be profiled, before anything is loaded
    torch.set_num_threads(settings.threads or (1 if settings.is_small else torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as scratch:
        report_step("loading")
        engine = _open(settings, device, Path(scratch), report_step)
    report_step("comparing answers")
    findings = engine.check()
    findings["plan"] = engine.plan()
    rows: list[Row] = []
    further: dict[tuple[Scenario, str], Further] = {}
    for scenario in settings.scenarios:
        report_step(scenario.label)
        runners = {variant: engine.runner(variant, scenario) for variant in engine.variants}
        rows += measure(scenario, runners, device, settings.rounds)
        further |= {(scenario, variant): _further(variant, scenario, engine) for variant in engine.variants}
        result = Result(settings=settings, device=device, findings=findings, rows=tuple(rows), further=further)
        write(result)
    return result


def _open(settings: Settings, device: torch.device, scratch: Path, report_step: Report) -> Engine:
    checkpoint = find_checkpoint(settings.model, scratch)
    if settings.engine == "transformers":
        from turnout.bench.transformers_scenarios import open_transformers

        return open_transformers(settings, checkpoint, device)
    from turnout.bench.transformers_engine import load_tokenizer, make_prompts
    from turnout.bench.vllm_engine import Load, modes_of, open_vllm
    from turnout.testing.tiny import held_out_text

    has_tokenizer = any(checkpoint.folder.glob("tokenizer*"))
    prompts = make_prompts(
        load_tokenizer(str(checkpoint.folder)) if has_tokenizer else None,
        held_out_text(),
        requests=max(settings.requests),
        tokens=settings.prefill,
        vocab_size=read_vocab_size(checkpoint),
    )
    is_eager = settings.eager or device.type == "cpu"
    load = Load(requests=settings.requests, prompt_tokens=settings.prefill)
    modes = modes_of(settings.consumer, layer=settings.layer)
    engine = open_vllm(checkpoint, device, modes, load, prompts, is_eager=is_eager)
    if not is_eager:
        engine.capture(report_step)
    return engine


def _further(variant: str, scenario: Scenario, engine: Engine) -> Further:
    runner, device = engine.runner(variant, scenario), engine.device
    runner.prepare()
    casts = ids_casts(runner.forward, device, (scenario.tokens, engine.top_k))
    model, copies = engine.model(variant), None
    if model is not None:
        runner.prepare()
        copies = copies_inside(runner.forward, device, model)
    launched = []
    if device.type != "cpu":
        runner.prepare()
        launched = kernels(lambda _: runner.forward(), device, calls=1)
    return Further(ids_casts=casts, copies_in_model=copies, kernels=launched)
