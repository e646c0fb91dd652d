"""Scenarios and their measurement: prefill or decode, some requests at a time, in several variants.

Nothing here knows an engine. An engine gives a `Runner` for each variant; `measure` counts what its forward
asks of the device and times the variants in alternation, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from turnout.bench.profile import Counts, count

PROFILED_FORWARDS = 3  # at most; the middle one counts: one may be interrupted
SECONDS_PER_PROFILE = 1.0  # after which no other forward is profiled
FEWEST_ROUNDS, MOST_ROUNDS = 6, 25  # six rounds are the fewest that give a median's 95% interval
SECONDS_PER_SCENARIO = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A load on a causal language model.

    Attributes:
        phase: ``"prefill"``: the prompts, one forward; ``"decode"``: one token per request and forward.
        requests: requests at a time.
        prompt_tokens: tokens of each prompt.
        forwards: forwards timed in one go: 1 in prefill, the number of decode steps in decode.
    """

    phase: Literal["prefill", "decode"]
    requests: int
    prompt_tokens: int
    forwards: int

    @property
    def label(self) -> str:
        """``prefill x 16``."""
        return f"{self.phase} x {self.requests}"

    @property
    def tokens(self) -> int:
        """Tokens that one forward computes."""
        return self.requests * (self.prompt_tokens if self.phase == "prefill" else 1)


class Runner(Protocol):
    """One variant of an engine in one scenario.

    Attributes:
        warm_up_forwards: how many forwards differ from all later ones.
    """

    warm_up_forwards: int

    def prepare(self) -> None:
        """Go back to the state before the first timed forward; not timed."""

    def forward(self) -> None:
        """Run one forward; need not wait for the device."""


@dataclass(frozen=True, slots=True)
class Row:
    """One variant in one scenario.

    Attributes:
        scenario: what ran.
        variant: how: ``"stock"``, ``"turnout"``, either followed by ``" compiled"``.
        counts: of one forward.
        seconds: time of one forward in each round; rounds are shared by the variants of a scenario.
    """

    scenario: Scenario
    variant: str
    counts: Counts
    seconds: tuple[float, ...]

    @property
    def median_seconds(self) -> float:
        """Median time of one forward."""
        return statistics.median(self.seconds)

    @property
    def quartile_seconds(self) -> tuple[float, float]:
        """Lower and upper quartile of the time of one forward."""
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper

    @property
    def tokens_per_second(self) -> float:
        """Throughput at the median."""
        return self.scenario.tokens / self.median_seconds

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values: what ran, the counts, the times and what follows from them."""
        return {
            **dataclasses.asdict(self.scenario),
            "variant": self.variant,
            **self.counts._asdict(),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "tpot_ms": self.median_seconds * 1e3 if self.scenario.phase == "decode" else None,
            "quartiles_ms": [seconds * 1e3 for seconds in self.quartile_seconds],
        }


@torch.no_grad()
def measure(
    scenario: Scenario, runners: Mapping[str, Runner], device: torch.device, rounds: int | None = None
) -> list[Row]:
    """Count and time every variant in a scenario.

    Args:
        scenario: the load that the runners carry.
        runners: one for each variant.
        device: where they compute.
        rounds: how often each variant is timed. None: for `SECONDS_PER_SCENARIO`, and at least
            `FEWEST_ROUNDS`, at most `MOST_ROUNDS` times.

    Returns:
        A row for each variant, in their order.
    """
    counts = {}
    for variant, runner in runners.items():
        for _ in range(math.ceil(runner.warm_up_forwards / scenario.forwards)):
            _time(runner, scenario.forwards, device)
        counts[variant] = _count(runner, device)

    seconds: dict[str, list[float]] = {variant: [] for variant in runners}
    order, start, done = list(runners), time.perf_counter(), 0
    while not _is_enough(done, rounds, time.perf_counter() - start):
        for variant in order:
            seconds[variant].append(_time(runners[variant], scenario.forwards, device))
        order.reverse()  # whoever runs first finds the caches of the last
        done += 1
    return [Row(scenario, variant, counts[variant], tuple(seconds[variant])) for variant in runners]


def _count(runner: Runner, device: torch.device) -> Counts:
    profiles: list[Counts] = []
    start = time.perf_counter()
    while not profiles or (len(profiles) < PROFILED_FORWARDS and time.perf_counter() - start < SECONDS_PER_PROFILE):
        runner.prepare()
        profiles.append(count(runner.forward, device))
    return sorted(profiles, key=lambda each: each.copy_share)[len(profiles) // 2]


def _is_enough(done: int, rounds: int | None, elapsed: float) -> bool:
    if rounds is not None:
        return done >= rounds
    return done >= MOST_ROUNDS or (done >= FEWEST_ROUNDS and elapsed >= SECONDS_PER_SCENARIO)


def _time(runner: Runner, forwards: int, device: torch.device) -> float:
    """Seconds of one forward, the mean over ``forwards`` in a row."""
    runner.prepare()
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(forwards):
        runner.forward()
    _wait_for(device)
    return (time.perf_counter() - start) / forwards


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
