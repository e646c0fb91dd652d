"""What ``turnout demo`` is asked for and what it found, as data, on a terminal and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.console import Console

from turnout.bench.scenario_table import scenario_table
from turnout.bench.scenarios import Row
from turnout.bench.transformers_engine import BITS_PER_BYTE_CHARACTERS
from turnout.bench.verdict import compare, verdict
from turnout.contracts import contracts, dtype_name
from turnout.machine import device_name, environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run.

    Attributes:
        model: folder or hub id of a Gemma 4 with experts; None: the tiny one that ships with turnout.
        device: a device of torch, or ``"auto"``: the accelerator if there is one, else the CPU.
        dtype: of the timed model, by name.
        prefill: tokens of each prompt.
        decode: decode steps in a round.
        repeat: rounds of each scenario; None: as many as fit, see `turnout.bench.scenarios.measure`.
        compiled: also run stock and turnout under torch.compile.
        threads: of the CPU. None: torch's own number for a given `model`, one for the tiny model, whose operators
            are too short to be worth sharing: waiting for a second thread dominates on a machine that is not idle.
    """

    model: str | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    prefill: int = 128
    decode: int = 16
    repeat: int | None = None
    compiled: bool = False
    threads: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consumer:
    """Who reads the routing in a phase.

    Attributes:
        layers: Mixture-of-Experts layers with something replaced.
        experts_implementation: what transformers runs the experts with.
        contract_name: its entry in `turnout.contracts`.
        impl: of `turnout.route`.
        experts_impl: of `turnout.experts`; None where the experts are stock.
        reason: why these.
    """

    layers: int
    experts_implementation: str
    contract_name: str
    impl: str
    experts_impl: str | None
    reason: str

    def __str__(self) -> str:
        contract = contracts[self.contract_name]
        ids, weights = dtype_name(contract.ids_dtype), dtype_name(contract.weights_dtype)
        return f"{self.experts_implementation} reads {ids} ids and {weights} weights"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Whether stock and turnout agree, in float32 on the same weights.

    Attributes:
        tokens_compared: greedily decoded tokens, over all requests.
        tokens_identical: whether all of them are the same.
        bits_per_byte: of stock and of turnout; None without a tokenizer.
    """

    tokens_compared: int
    tokens_identical: bool
    bits_per_byte: tuple[float, float] | None

    def __str__(self) -> str:
        same = "identical" if self.tokens_identical else "NOT identical"
        text = f"float32: {self.tokens_compared} greedy tokens are {same}"
        if self.bits_per_byte is None:
            return text
        stock, turnout = self.bits_per_byte
        return f"{text}; bits per byte {stock:.4f} stock, {turnout:.4f} with turnout"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured.

    Attributes:
        settings: what was asked for.
        device: where it ran.
        geometry: sizes of the model.
        prompts: what they are made of.
        consumers: of each phase.
        rows: the table, scenario by scenario.
        bits_per_byte: of each variant; None without a tokenizer.
        identity: agreement in float32.
    """

    settings: Settings
    device: torch.device
    geometry: dict[str, int]
    prompts: str
    consumers: dict[str, Consumer]
    rows: tuple[Row, ...]
    bits_per_byte: dict[str, float | None]
    identity: Identity

    @property
    def verdict(self) -> str:
        """What changed and why, in plain words."""
        reads = "; ".join(dict.fromkeys(map(str, self.consumers.values())))
        prefill = self.consumers["prefill"]
        why = (
            f"in each of its {prefill.layers} layers one operator does softmax, top-k, normalisation and scale, and "
            f"stores what the experts read ({reads})"
        )
        if prefill.experts_impl is not None:
            why += ", and one operator is the experts, down to the weighted sum"
        return f"{verdict(self.rows, self._launches, self._time, why)} {self._answers}".strip()

    @property
    def _launches(self) -> str:
        return "operators" if self._on_cpu else "launches"

    @property
    def _time(self) -> str:
        return "CPU time" if self._on_cpu else "device time"

    @property
    def _answers(self) -> str:
        stock, turnout = self.bits_per_byte["stock"], self.bits_per_byte["turnout"]
        if stock is None or turnout is None or self.identity.bits_per_byte is None:
            return ""
        exact_stock, exact_turnout = self.identity.bits_per_byte
        if stock == turnout:
            return f"Bits per byte are the same in {self.settings.dtype}."
        return (
            f"Bits per byte differ by {abs(turnout - stock):.4f} in {self.settings.dtype}, where ties between experts "
            "and the last bit of a weight decide how values round, and by "
            f"{abs(exact_turnout - exact_stock):.4f} in float32."
        )

    def show(self, console: Console) -> None:
        """Print the table, whether tokens agree, and the verdict."""
        name = self.settings.model or "the tiny Gemma 4 of turnout"
        title = f"{name}, {self.settings.dtype}, on {device_name(self.device.type)}"
        console.print(
            scenario_table(
                self.rows, self.bits_per_byte, launches="ops" if self._on_cpu else self._launches, title=title
            )
        )
        rounds = [len(row.seconds) for row in self.rows]
        ops = "; ops: operators, those called by operators left out" if self._on_cpu else ""
        console.print(
            f"\n[dim]Of one forward: calls of aten::copy_, their share of {self._time}{ops}. tok/s and time per "
            f"output token (TPOT): median; ±: half the interquartile range of {min(rounds)} to {max(rounds)} rounds, "
            f"variants in turn. Bits per byte: of {BITS_PER_BYTE_CHARACTERS} characters of held-out text. "
            f"Prompts: {self.prompts}, {self.settings.prefill} tokens. CPU threads: {torch.get_num_threads()}.[/dim]\n"
        )
        console.print(f"{self.identity}.\n")
        console.print(self.verdict)

    @property
    def _on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values.

        Schema::

            environment: date, versions, machine, threads, commit; see `turnout.machine`
            settings: the fields of `Settings`
            model: layers, hidden_size, num_experts, top_k, moe_intermediate_size, vocab_size, parameters
            prompts: what they are made of
            bits_per_byte_characters: of held-out text, on which bits per byte are measured
            consumers: {prefill, decode}, each with the fields of `Consumer`
            rows: one for each scenario and variant
                phase: "prefill" or "decode"
                requests, prompt_tokens, forwards: at a time; of each prompt; in one round
                variant: "stock", "turnout", "stock compiled" or "turnout compiled"
                copies, copy_share, launches: of one forward, as `turnout.bench.profile.Counts`
                seconds: of one forward, a list over rounds; the n-th of each variant in a scenario go together
                tokens_per_second: at the median
                tpot_ms: median time of one decode step; null in prefill
                quartiles_ms: [lower, upper] of one forward
                bits_per_byte: of the variant; null without a tokenizer
            comparisons: one for each scenario, the fastest turnout variant against the fastest stock variant
                phase, requests, stock, turnout: which
                time_change: median, relative; interval: [lower, upper], 95% of that median, null below 6 rounds
            float32: the fields of `Identity`
            verdict: the last words of the report
        """
        return {
            "environment": environment(self.device.type),
            "settings": dataclasses.asdict(self.settings),
            "model": self.geometry,
            "prompts": self.prompts,
            "bits_per_byte_characters": BITS_PER_BYTE_CHARACTERS,
            "consumers": {phase: dataclasses.asdict(each) for phase, each in self.consumers.items()},
            "rows": [{**row.to_json(), "bits_per_byte": self.bits_per_byte[row.variant]} for row in self.rows],
            "comparisons": [
                {
                    "phase": comparison.scenario.phase,
                    "requests": comparison.scenario.requests,
                    "stock": comparison.stock,
                    "turnout": comparison.turnout,
                    "time_change": comparison.time._asdict(),
                }
                for comparison in compare(self.rows)
            ],
            "float32": dataclasses.asdict(self.identity),
            "verdict": self.verdict,
        }
