"""A whole layer, from router logits to its output: turnout against vLLM and transformers, on a CUDA device."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from turnout.bench.ceilings import Ceilings, measure_ceilings
from turnout.bench.layer_case import DTYPES, ROUTINGS, Case, Geometry, draw_case, draw_layers
from turnout.bench.layer_check import Expected, expected_output
from turnout.bench.layer_peers import Call, Vllm, nearest_tuned_file, transformers_variant, tuned_config
from turnout.bench.profile import kernels
from turnout.bench.timing import graph_times, launches
from turnout.experts.api import IMPLS, choose_impl, contract_of, experts
from turnout.machine import accelerator, environment
from turnout.routing.api import route
from turnout.types import RoutingInputs

NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
# Beyond so many tokens a variant takes so long, or so much memory, that nobody would use it.
MOST_TOKENS = {"turnout triton": 256, "transformers batched_mm": 32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run.

    Attributes:
        geometry: of the layer.
        num_tokens: T of each row.
        routing: a name of `ROUTINGS`.
        layers: whose weights the calls rotate through, so that no cache holds them.
        rounds: replays of each variant, in turns.
        vllm_site: folder to import vLLM from; None: where Python finds it.
    """

    geometry: Geometry = dataclasses.field(default_factory=Geometry)
    num_tokens: tuple[int, ...] = NUM_TOKENS
    routing: str = "uniform"
    layers: int = 12
    rounds: int = 20
    vllm_site: Path | None = None

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}; got {self.routing!r}")
        if self.geometry.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.geometry.dtype!r}")
        _ = self.geometry.router_spec, self.geometry.experts_spec  # they refuse what does not fit


def run(settings: Settings, report: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Check and time every variant at every number of tokens.

    Args:
        settings: what to run.
        report: called with the result so far, after each row: a run that is cut off leaves what it has.
        say: called with a few words at the start of each step.

    Returns:
        The record; variants that could not run, or were wrong, are named under ``absent`` with the reason.

    Raises:
        ValueError: there is no CUDA device.
    """
    device = find_gpu()
    geometry = settings.geometry
    say("vLLM")
    peers = Peers(settings)
    say("read and matmul rates")
    ceilings = measure_ceilings(DTYPES[geometry.dtype], device)
    generator = torch.Generator(device).manual_seed(0)
    layers = draw_layers(geometry, settings.layers, generator)
    result: dict[str, Any] = {
        "what": "a layer: router logits to its output; microseconds of one call in a CUDA graph",
        "environment": environment(device.type),
        "geometry": dataclasses.asdict(geometry),
        "layers": settings.layers,
        "routing": f"{settings.routing}: {ROUTINGS[settings.routing]}",
        "ceilings": ceilings._asdict(),
        "vllm": peers.record(),
        "rows": [],
    }
    for num_tokens in settings.num_tokens:
        say(f"{num_tokens} tokens")
        case = draw_case(geometry, num_tokens, settings.routing, layers, generator)
        result["rows"].append(measure(case, peers, ceilings, settings.rounds))
        report(result)
    say("done")
    return result


def find_gpu() -> torch.device:
    """The device that graphs are replayed on.

    Raises:
        ValueError: there is none.
    """
    device = accelerator()
    if device is None or device.type != "cuda":
        raise ValueError("turnout bench layer replays CUDA graphs, and there is no CUDA device here")
    return device


class Peers:
    """The variants of a case, and why some are absent.

    Attributes:
        absent: reasons by variant, for all cases.
    """

    def __init__(self, settings: Settings) -> None:
        self.absent: dict[str, str] = {}
        self.vllm: Vllm | None = None
        self.tuned: Path | None = None
        self.is_tuned = False
        try:
            self.vllm = Vllm(settings.vllm_site)
        except ImportError as error:
            self.absent["vLLM"] = str(error)
            return
        self.is_tuned = self.vllm.has_tuned_file(settings.geometry)
        if not self.is_tuned:
            try:
                self.tuned = nearest_tuned_file(self.vllm.folder, settings.geometry)
            except FileNotFoundError as error:
                self.absent["vLLM tuned"] = str(error)

    def record(self) -> dict[str, Any] | None:
        """What a reader must know of vLLM's part."""
        if self.vllm is None:
            return None
        return {
            "version": self.vllm.version,
            "vLLM": "its configuration tuned for this geometry and device"
            if self.is_tuned
            else "its default configurations: it ships none tuned for this geometry and device",
            "vLLM tuned": f"configurations of {self.tuned.name}, the nearest that it ships" if self.tuned else None,
        }

    def variants(self, case: Case) -> dict[str, Callable[[], Call]]:
        """Makers of every variant that could run on the case; they may raise."""
        makers: dict[str, Callable[[], Call]] = {}
        for impl in ("auto", *IMPLS):
            if impl not in ("reference", "cpu"):
                makers[f"turnout {impl}"] = partial(turnout_variant, case, impl)
        if self.vllm:
            makers["vLLM"] = partial(self.vllm.variant, case, None)
            if self.tuned:
                makers["vLLM tuned"] = partial(self.vllm.variant, case, tuned_config(self.tuned, case.num_tokens))
        for impl in ("grouped_mm", "batched_mm"):
            makers[f"transformers {impl}"] = partial(transformers_variant, case, impl)
        return makers

    def configs(self, case: Case) -> dict[str, Any]:
        """The tile configurations with which vLLM's variants run a case."""
        configs: dict[str, Any] = {}
        if self.vllm:
            configs["vLLM"] = self.vllm.chosen_config(case)
        if self.tuned:
            configs["vLLM tuned"] = tuned_config(self.tuned, case.num_tokens)
        return configs


def turnout_variant(case: Case, impl: str) -> Call:
    """The last four stations of `turnout.moe`: it has no router's projection here."""
    if impl != "auto" and importlib.util.find_spec(f"turnout.experts.{impl}") is None:
        raise ImportError(f"turnout has no implementation {impl} of the experts")
    router_spec, experts_spec = case.geometry.router_spec, case.geometry.experts_spec
    top_k, num_experts = router_spec.top_k, router_spec.num_experts
    if impl == "auto":
        impl = choose_impl(case.hidden_states[0], top_k, num_experts).impl
    contract = contract_of(impl, case.num_tokens * top_k, num_experts)
    inputs = [RoutingInputs(per_expert_scale=scale) for _, scale in case.layers]

    def call(i: int) -> torch.Tensor:
        hidden_states, router_logits, weights, _ = case.at(i)
        routing = route(router_logits, router_spec, contract, inputs[i % len(inputs)])
        return experts(hidden_states, weights, routing, experts_spec, impl=impl)

    return call


def measure(case: Case, peers: Peers, ceilings: Ceilings, rounds: int) -> dict[str, Any]:
    """One row: each variant checked, counted and profiled, then all timed in interleaved graph replays."""
    geometry, num_tokens = case.geometry, case.num_tokens
    distinct = case.distinct_experts()
    moved = geometry.moved(num_tokens, distinct)
    floor, by = ceilings.floor(moved, geometry.operations(num_tokens))
    expected = expected_output(case, 0)
    calls: dict[str, Call] = {}
    variants: dict[str, dict[str, Any]] = {}
    absent = dict(peers.absent)
    for name, make in peers.variants(case).items():
        try:
            if num_tokens > MOST_TOKENS.get(name, num_tokens):
                raise ValueError(f"not run beyond {MOST_TOKENS[name]} tokens")
            call = make()
            variants[name] = describe(name, call, expected, case)
            calls[name] = call
        except _failures() as error:
            absent[name] = f"{type(error).__name__}: {error}"
    for name, timing in graph_times(calls, calls=calls_of(num_tokens), rounds=rounds).items():
        variants[name]["us"] = [round(value, 3) for value in timing]
    release_memory()
    return {
        "num_tokens": num_tokens,
        "distinct_experts": round(distinct, 1),
        "megabytes": round(moved / 1e6, 2),
        "gigaflops": round(geometry.operations(num_tokens) / 1e9, 2),
        "floor_us": round(floor, 3),
        "floor_by": by,
        "plain_error": expected.plain_error,
        "vllm_configs": peers.configs(case),
        "variants": variants,
        "absent": absent,
    }


def describe(name: str, call: Call, expected: Expected, case: Case) -> dict[str, Any]:
    """Error, launches and kernels of a variant.

    Raises:
        RuntimeError: its output is wrong.
    """
    expected.poison_free_memory()
    error = expected.check(name, call(0))
    return {
        "error": error,
        "launches": launches(call),
        "kernels": [
            {"name": kernel.name[:200], "times": round(kernel.times, 2), "us": round(kernel.us, 3)}
            for kernel in kernels(call, case.hidden_states.device)
        ],
    }


def _failures() -> tuple[type[Exception], ...]:
    """What a variant may raise where it cannot run, or is wrong; the others are run nevertheless."""
    from triton.errors import TritonError

    return (ValueError, RuntimeError, ImportError, AttributeError, TypeError, AssertionError, KeyError, TritonError)


def release_memory() -> None:
    """Give back what the graphs of a row kept for themselves."""
    gc.collect()
    torch.accelerator.empty_cache()


def calls_of(num_tokens: int) -> int:
    """How many calls a graph holds: few microseconds each need many."""
    return 96 if num_tokens <= 8 else 24 if num_tokens <= 256 else 12


def table(result: dict[str, Any]) -> str:
    """The medians of a result, in microseconds, and its launches, as Markdown tables."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["variants"]))
    lines = [
        f"| tokens | distinct experts | MB | floor | {' | '.join(names)} | auto / vLLM |",
        "|---:" * (len(names) + 5) + "|",
    ]
    for row in result["rows"]:
        medians = {name: variant["us"][0] for name, variant in row["variants"].items()}
        cells = " | ".join(f"{medians[name]:.1f}" if name in medians else "" for name in names)
        ours, theirs = medians.get("turnout auto"), [medians[name] for name in medians if name.startswith("vLLM")]
        ratio = f"{ours / min(theirs):.3f}" if ours and theirs else ""
        lines.append(
            f"| {row['num_tokens']} | {row['distinct_experts']:.1f} | {row['megabytes']:.0f} | "
            f"{row['floor_us']:.1f} ({row['floor_by']}) | {cells} | {ratio} |"
        )
    lines += ["", f"| launches, tokens | {' | '.join(names)} |", "|---:" * (len(names) + 1) + "|"]
    for row in result["rows"]:
        counts = (str(row["variants"].get(name, {}).get("launches", "")) for name in names)
        lines.append(f"| {row['num_tokens']} | {' | '.join(counts)} |")
    reasons = {f"{name}: {reason}" for row in result["rows"] for name, reason in row["absent"].items()}
    return "\n".join([*lines, "", *(f"Absent: {reason}" for reason in sorted(reasons))])
