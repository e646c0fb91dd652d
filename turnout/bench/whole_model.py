"""``turnout bench transformers``: a Gemma 4 26B-A4B with random weights in transformers, stock and with turnout."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.table import Table

from turnout.bench.scenarios import Row, Runner, Scenario, measure
from turnout.bench.transformers_engine import Decode, Variant, twin_of
from turnout.bench.whole_model_check import LayerCheck, check_layers, relative_difference
from turnout.integrations.transformers import apply
from turnout.machine import environment, find_device

# Copies of the model's configuration, which agree with each other; 25.23 billion parameters.
GEMMA4_26B: dict[str, Any] = {
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_hidden_layers": 30,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "final_logit_softcapping": 30.0,
}
TINY: dict[str, Any] = {
    **GEMMA4_26B,
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 64,
    "num_experts": 32,
    "moe_intermediate_size": 64,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run.

    Attributes:
        device: a device of torch.
        tiny: two small layers in place of the whole geometry, to try the benchmark itself.
        requests: at a time, one scenario each.
        prompt_tokens: of each request.
        decode: steps in a round.
        rounds: of each scenario; None: as many as fit, see `turnout.bench.scenarios.measure`.
        compiled: also under torch.compile, with a static cache and, on a GPU, in CUDA graphs.
    """

    device: str = "cuda"
    tiny: bool = False
    requests: tuple[int, ...] = (1, 16)
    prompt_tokens: int = 128
    decode: int = 8
    rounds: int | None = None
    compiled: bool = True


# Weight of the norms after each sublayer, in place of 1: with random weights the rounding of a single value would else
# decide all that follows, and the logits of two right computations would have nothing in common after 30 layers.
POST_NORM = 1 / 32
LOGITS_TOLERANCE = 2.0

# What counts steps in a static cache with a sliding window: a compiler that learns that it changes compiles only once.
DYNAMIC_SOURCES = ".*cumulative_length_int.*"


@torch.no_grad()
def run(settings: Settings, report_step: Callable[[str], None], write: Callable[[dict[str, Any]], None]) -> list[Row]:
    """Build the model, compare stock and turnout, then measure a decode step of each.

    Args:
        settings: what to run.
        report_step: called with a few words at the start of each step.
        write: called with the result, JSON values, after each scenario.

    Raises:
        ValueError: there is no such device.
        RuntimeError: the layers of the two do not agree; nothing is timed then.
    """
    device = find_device(settings.device)
    start = time.perf_counter()

    def report(step: str) -> None:
        report_step(f"{time.perf_counter() - start:5.0f} s  {step}")

    report("creating the model")
    stock = build_model(TINY if settings.tiny else GEMMA4_26B, device)
    turnout = twin_of(stock)
    report("applying turnout")
    applied = apply(turnout)
    variants = {"stock": Variant(stock), "turnout": Variant(turnout)}
    if settings.compiled:
        variants["stock compiled"] = Variant(stock, is_compiled=True)
        variants["turnout compiled"] = Variant(turnout, is_compiled=True)
    result: dict[str, Any] = {
        "environment": environment(device.type),
        "settings": dataclasses.asdict(settings),
        "parameters": sum(parameter.numel() for parameter in stock.parameters()),
        "applied": str(applied),
        "layer_checks": [],
        "logits": [],
        "distinct_experts": [],
        "rows": [],
    }
    rows: list[Row] = []
    compiler: Any = torch.compiler.config
    for requests in settings.requests:
        scenario = Scenario(
            phase="decode", requests=requests, prompt_tokens=settings.prompt_tokens, forwards=settings.decode
        )
        torch.compiler.reset()
        with compiler.patch(dynamic_sources=DYNAMIC_SOURCES):
            rows += _scenario(scenario, variants, settings.rounds, report, result)
        result["rows"] = [_row_json(row) for row in rows]
        result["seconds"] = time.perf_counter() - start
        write(result)
    report("done")
    return rows


def _scenario(
    scenario: Scenario,
    variants: dict[str, Variant],
    rounds: int | None,
    report: Callable[[str], None],
    result: dict[str, Any],
) -> list[Row]:
    """Check and measure one scenario; the findings of the check are added to ``result``."""
    stock = variants["stock"].model
    prompts = draw_prompts(scenario, stock.config.vocab_size, stock.device)
    report(f"{scenario.label}: layers of stock and turnout on the same inputs")
    checks = check_layers(stock, variants["turnout"].model, decode_step(variants["stock"], scenario, prompts))
    result["layer_checks"] += [{"requests": scenario.requests, **dataclasses.asdict(check)} for check in checks]
    check_agreement(checks)
    result["logits"].append({"requests": scenario.requests, **_logits_apart(scenario, variants, prompts, report)})
    report(f"{scenario.label}: measuring")
    runners = {name: variant.runner(scenario, prompts) for name, variant in variants.items()}
    rows = measure(scenario, runners, stock.device, rounds)
    counts = distinct_experts(stock, runners["stock"])
    result["distinct_experts"].append({"requests": scenario.requests, "by_layer": counts})
    return rows


def _logits_apart(
    scenario: Scenario, variants: dict[str, Variant], prompts: torch.Tensor, report: Callable[[str], None]
) -> dict[str, Any]:
    """How far the logits of the first decode step lie from stock's: root mean square, relative.

    The yardstick is stock with its experts in a loop ("eager"), which rounds elsewhere.
    """
    logits = {}
    for name, variant in variants.items():
        report(f"{scenario.label}: logits of {name}")
        logits[name] = decode_step(variant, scenario, prompts)()
    stock = variants["stock"].model
    implementation = stock.config._experts_implementation
    stock.set_experts_implementation("eager")
    yardstick = relative_difference(decode_step(Variant(stock), scenario, prompts)(), logits["stock"])
    stock.set_experts_implementation(implementation)
    apart = {name: relative_difference(each, logits["stock"]) for name, each in logits.items() if name != "stock"}
    if apart["turnout"] > LOGITS_TOLERANCE * yardstick:
        raise RuntimeError(f"turnout's logits lie further from stock's than rounding explains: {apart}, {yardstick=}")
    return {"relative_to_stock": apart, "yardstick": yardstick}


def build_model(fields: dict[str, Any], device: torch.device) -> Any:
    """A Gemma 4 in bfloat16 on the device, its weights as the class draws them: standard deviation 0.02."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    model_class: Any = Gemma4ForCausalLM
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = model_class._from_config(Gemma4TextConfig(**fields), dtype=torch.bfloat16)
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(POST_NORM)
            layer.post_feedforward_layernorm.weight.fill_(POST_NORM)
    return model.eval()


def draw_prompts(scenario: Scenario, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Random ids, so that tokens differ and routing is as even as random weights make it."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (scenario.requests, scenario.prompt_tokens), generator=generator).to(device)


def decode_step(variant: Variant, scenario: Scenario, prompts: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The first decode step after the prompts, as a call that returns logits [R, V]; it repeats their last tokens.

    Its cache is as long as the one that is timed: another length would compile twice.
    """
    decode = Decode(variant, prompts, scenario.forwards)
    decode.prepare()
    decode.tokens = [prompts[:, -1:]]
    return lambda: decode.logits().float()


def distinct_experts(stock: Any, runner: Runner) -> list[int]:
    """How many experts each layer of the stock model runs in the last step of a round."""
    counts: list[int] = []

    def count(module: object, args: object, output: Any) -> None:
        counts.append(output[2].unique().numel())

    handles = [layer.router.register_forward_hook(count) for layer in stock.model.layers]
    runner.forward()
    for handle in handles:
        handle.remove()
    return counts


def check_agreement(checks: list[LayerCheck]) -> None:
    """Raise a RuntimeError for layers that do not compute what stock's do, as far as bfloat16 can tell."""
    for check in checks:
        if check.ids_differ_without_tie:
            raise RuntimeError(f"turnout chose other experts than stock where no logits tie: {check}")
        if check.turnout_error > 2 * check.stock_error:
            raise RuntimeError(f"the error of turnout's experts is more than twice that of stock's: {check}")


def _row_json(row: Row) -> dict[str, Any]:
    return {
        **dataclasses.asdict(row.scenario),
        "variant": row.variant,
        **row.counts._asdict(),
        "step_ms": row.median_seconds * 1e3,
        "quartiles_ms": [seconds * 1e3 for seconds in row.quartile_seconds],
        "seconds": row.seconds,
    }


def table(rows: list[Row]) -> Table:
    """Decode steps, a block for each scenario."""
    lines = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("scenario", "variant"):
        lines.add_column(heading, no_wrap=True)
    for heading in ("step\nms", "±", "device\nms", "launches", "graphs", "copy_\ncalls", "copy_\ntime"):
        lines.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.variant == "stock":
            lines.add_section()
        lower, upper = row.quartile_seconds
        lines.add_row(
            row.scenario.label if row.variant == "stock" else "",
            row.variant,
            f"{row.median_seconds * 1e3:.2f}",
            f"{(upper - lower) / 2 / row.median_seconds:.0%}",
            f"{row.counts.device_ms:.2f}",
            str(row.counts.launches),
            str(row.counts.graphs),
            str(row.counts.copies),
            f"{row.counts.copy_share:.1%}",
        )
    return lines
