"""``turnout demo``: a Gemma 4 of transformers, stock and with turnout, in the scenarios of PR 40565."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from turnout.bench.demo_result import Consumer, Identity, Result, Settings
from turnout.bench.scenarios import Row, Scenario, measure
from turnout.bench.transformers_engine import (
    Variant,
    decoded_tokens,
    load_model,
    load_tokenizer,
    make_prompts,
    read_config,
    twin_of,
)
from turnout.integrations.transformers import apply, explain
from turnout.machine import accelerator, find_device, profiler_activities
from turnout.testing.tiny import TINY_GEMMA4, held_out_text

REQUESTS = (1, 16)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """A loaded model, and what it is given to read; made by `open_demo`.

    Attributes:
        settings: what was asked for.
        device: where the model is.
        stock: the model as transformers loads it.
        turnout: the same parameters, with turnout applied.
        tokenizer: None if the checkpoint has none.
        prompts: [R, P] int64 on the device.
    """

    settings: Settings
    device: torch.device
    stock: Any
    turnout: Any
    tokenizer: Any | None
    prompts: torch.Tensor


def open_demo(settings: Settings, *, requests: int = max(REQUESTS)) -> Demo:
    """Load the model and cut the prompts; sets torch's number of threads.

    Args:
        settings: what was asked for.
        requests: number of prompts.

    Raises:
        ValueError: a setting that cannot be honoured: no such model, device or dtype, or prompts too long.
    """
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {settings.dtype!r}")
    device = find_device(settings.device) if settings.device != "auto" else accelerator() or torch.device("cpu")
    profiler_activities(device.type)  # refuses a device that cannot be profiled, before anything is loaded
    threads = settings.threads or (1 if settings.model is None else torch.get_num_threads())
    torch.set_num_threads(threads)
    name = settings.model or str(TINY_GEMMA4)
    config = read_config(name)
    if settings.prefill + settings.decode > config.max_position_embeddings:
        raise ValueError(
            f"{settings.prefill} prompt tokens and {settings.decode} decoded ones are more than the model's "
            f"{config.max_position_embeddings} positions; lower --prefill or --decode"
        )
    tokenizer = load_tokenizer(name)
    prompts = make_prompts(
        tokenizer,
        held_out_text(),
        requests=requests,
        tokens=settings.prefill,
        vocab_size=config.vocab_size,
    )
    stock = load_model(name, DTYPES[settings.dtype], device)
    turnout = twin_of(stock)
    apply(turnout)
    return Demo(
        settings=settings,
        device=device,
        stock=stock,
        turnout=turnout,
        tokenizer=tokenizer,
        prompts=prompts.to(device),
    )


def run_demo(demo: Demo, report_step: Callable[[str], None]) -> Result:
    """Measure every scenario, bits per byte, and the agreement in float32.

    Args:
        demo: what to run; its models are in float32 afterwards.
        report_step: called with a few words at the start of each step.
    """
    variants = {"stock": Variant(demo.stock), "turnout": Variant(demo.turnout)}
    if demo.settings.compiled:
        variants["stock compiled"] = Variant(demo.stock, is_compiled=True)
        variants["turnout compiled"] = Variant(demo.turnout, is_compiled=True)
    consumers = _consumers(variants["turnout"])

    rows: list[Row] = []
    for scenario in _scenarios(demo.settings):
        report_step(scenario.label)
        torch.compiler.reset()  # each scenario compiles for itself: none meets the other's recompilation limit
        prompts = demo.prompts[: scenario.requests]
        runners = {name: variant.runner(scenario, prompts) for name, variant in variants.items()}
        rows += measure(scenario, runners, demo.device, demo.settings.repeat)

    report_step("bits per byte")
    torch.compiler.reset()
    bits = {name: _bits_per_byte(demo, variant) for name, variant in variants.items()}
    report_step("float32")
    return Result(
        settings=demo.settings,
        device=demo.device,
        geometry=_geometry(demo.stock),
        prompts="random ids (no tokenizer)" if demo.tokenizer is None else "held-out text",
        consumers=consumers,
        rows=tuple(rows),
        bits_per_byte=bits,
        identity=_identity_in_float32(demo),
    )


def _scenarios(settings: Settings) -> list[Scenario]:
    prefill = Scenario(phase="prefill", requests=1, prompt_tokens=settings.prefill, forwards=1)
    decode = dataclasses.replace(prefill, phase="decode", forwards=settings.decode)
    return [dataclasses.replace(each, requests=n) for each in (prefill, decode) for n in REQUESTS]


def _consumers(variant: Variant) -> dict[str, Consumer]:
    """Of each phase: who reads the routing, and in which form."""
    consumers = {}
    for phase in ("prefill", "decode"):
        variant.use_experts(phase)
        rows = [row for row in explain(variant.model) if "replaced" in (row.router.state, row.experts.state)]
        router, experts = rows[0].router, rows[0].experts
        consumers[phase] = Consumer(
            layers=len(rows),
            experts_implementation=str(experts.implementation),
            contract_name=str(router.contract_name),
            impl=str(router.impl),
            experts_impl=experts.impl if experts.state == "replaced" else None,
            reason=f"{router.reason}; {experts.reason}",
        )
    return consumers


def _bits_per_byte(demo: Demo, variant: Variant) -> float | None:
    return None if demo.tokenizer is None else variant.bits_per_byte(demo.tokenizer, held_out_text())


def _identity_in_float32(demo: Demo) -> Identity:
    """Convert both models in place, since a large one would not fit twice, and compare their answers."""
    stock, turnout = (Variant(model.float()) for model in (demo.stock, demo.turnout))
    tokens = decoded_tokens(stock, demo.prompts, demo.settings.decode)
    same = torch.equal(tokens, decoded_tokens(turnout, demo.prompts, demo.settings.decode))
    before, after = (_bits_per_byte(demo, variant) for variant in (stock, turnout))
    return Identity(
        tokens_compared=tokens.numel(),
        tokens_identical=same,
        bits_per_byte=None if before is None or after is None else (before, after),
    )


def _geometry(model: Any) -> dict[str, int]:
    config = model.config.get_text_config()
    return {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_experts": config.num_experts,
        "top_k": config.top_k_experts,
        "moe_intermediate_size": config.moe_intermediate_size,
        "vocab_size": config.vocab_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
