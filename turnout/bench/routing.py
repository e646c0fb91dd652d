"""Routing alone: turnout against vLLM's kernel and torch, at one model's geometry, on a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from turnout.bench.timing import graph_times, summary
from turnout.bench.vllm_kernel import find_source, load_gemma4_routing
from turnout.contracts import Contract
from turnout.machine import environment
from turnout.routing.api import route
from turnout.routing.inputs import RoutingTensors
from turnout.spec import RouterSpec
from turnout.types import Routing, RoutingInputs

NUM_TOKENS = (1, 16, 256, 1024, 4096, 16384, 65536)
CACHE_BYTES = 60 << 20  # inputs rotate over several times the L2 of an H200
TOLERANCE = 1e-6  # of a weight: peers round in their own ways; how exact turnout is, its tests say


def run(num_experts: int, top_k: int, dtype: torch.dtype, vllm_folder: Path | None, rounds: int) -> dict[str, Any]:
    """Check and time every variant at every number of tokens, then the host's share of one call.

    Raises:
        ValueError: there is no CUDA device, or vLLM's source lacks the kernel.
        FileNotFoundError: vLLM's source is not there.
        RuntimeError: a variant gives wrong results, and so is not timed.
    """
    if not torch.cuda.is_available():
        raise ValueError("turnout bench routing replays CUDA graphs, and there is no CUDA device here")
    spec = RouterSpec(num_experts=num_experts, top_k=top_k, renormalize=True, per_expert_scale=True)
    kernel, _ = load_gemma4_routing(find_source(vllm_folder))
    floor = memory_rate()
    rows = [measure(spec, dtype, num_tokens, kernel, floor, rounds) for num_tokens in NUM_TOKENS]
    return {
        "what": "routing: router_logits to ids and weights; microseconds of one call in a CUDA graph",
        "environment": environment("cuda"),
        "spec": json.loads(spec.key),
        "logits": str(dtype),
        "logits_drawn": "standard normal",
        "vllm_source": str(find_source(vllm_folder)),
        "bytes_per_us": floor,
        "rows": rows,
        "host": host_cost(spec, dtype),
    }


def measure(
    spec: RouterSpec, dtype: torch.dtype, num_tokens: int, vllm: Any, bytes_per_us: float, rounds: int
) -> dict[str, Any]:
    """One row of the table: each variant checked, then timed in interleaved graph replays."""
    sets = max(1, min(8, 4 * CACHE_BYTES // (num_tokens * spec.num_experts * dtype.itemsize)))
    logits = [torch.randn(num_tokens, spec.num_experts, device="cuda").to(dtype) for _ in range(sets)]
    scale = torch.rand(spec.num_experts, device="cuda") + 0.5
    variants = _variants(spec, logits, scale, vllm)
    expected = route(logits[0], spec, Contract(ids_dtype=torch.int64), RoutingInputs(per_expert_scale=scale),
                     impl="reference")  # fmt: skip
    for name, call in variants.items():
        check(name, call(0), expected, logits[0])
    calls = 100 if num_tokens < 4096 else 16
    times = graph_times(variants, calls=calls, rounds=rounds)
    slots = num_tokens * spec.top_k
    moved = logits[0].numel() * dtype.itemsize + slots * (8 + 4)
    return {
        "num_tokens": num_tokens,
        "floor_us": round(moved / bytes_per_us, 3),
        **{name: [round(value, 3) for value in timing] for name, timing in times.items()},
    }


def _variants(
    spec: RouterSpec, logits: list[torch.Tensor], scale: torch.Tensor, vllm: Any
) -> dict[str, Callable[[int], Any]]:
    """Each returns (weights, ids) and rotates over the inputs; outputs are allocated before, poisoned once."""
    num_tokens, sets = logits[0].shape[0], len(logits)
    block_e = 1 << (spec.num_experts - 1).bit_length()
    inputs = RoutingInputs(per_expert_scale=scale)

    def outputs(ids_dtype: torch.dtype) -> Routing:
        shape = (num_tokens, spec.top_k)
        weights = torch.full(shape, float("nan"), device="cuda")
        return Routing(weights, torch.full(shape, -7, dtype=ids_dtype, device="cuda"))

    contracts = {name: Contract(ids_dtype=dtype) for name, dtype in (("int64", torch.int64), ("int32", torch.int32))}
    buffers = {name: outputs(contract.ids_dtype) for name, contract in contracts.items()}
    theirs, cast = outputs(torch.int32), outputs(torch.int64)

    def turnout(name: str) -> Callable[[int], Any]:
        return lambda i: route(logits[i % sets], spec, contracts[name], inputs, out=buffers[name], impl="triton")

    def vllm_int32(i: int) -> Any:
        vllm[(num_tokens,)](
            logits[i % sets], scale, *theirs[:2], spec.num_experts, spec.top_k, block_e, num_warps=1
        )  # fmt: skip
        return theirs

    def vllm_then_cast(i: int) -> Any:
        vllm_int32(i)
        cast.topk_ids.copy_(theirs.topk_ids)
        return theirs.topk_weights, cast.topk_ids

    return {
        "turnout int64": turnout("int64"),
        "turnout int32": turnout("int32"),
        "vLLM int32": vllm_int32,
        "vLLM + cast": vllm_then_cast,
        "torch": lambda i: _torch_routing(logits[i % sets], spec.top_k, scale),
    }


def _torch_routing(logits: torch.Tensor, top_k: int, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gemma 4's routing as stock transformers writes it."""
    weights, ids = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), top_k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True) * scale[ids], ids


def check(name: str, got: Sequence[torch.Tensor], expected: Routing, logits: torch.Tensor) -> None:
    """Refuse to time a variant that is wrong: compare weights by expert, and allow no NaN and no missing slot.

    A row in which the last logit chosen ties with one left out has several right answers, and is not compared.

    Raises:
        RuntimeError: a row differs.
    """
    top_k = expected.topk_ids.shape[1]
    ranked = logits.sort(dim=-1, descending=True).values
    is_tied = ranked[:, top_k - 1] == ranked[:, min(top_k, logits.shape[1] - 1)]
    given, wanted = (
        torch.zeros(logits.shape, device=logits.device).scatter(1, ids.long(), weights)
        for weights, ids in (got[:2], expected[:2])
    )
    is_right = ((given - wanted).abs() <= TOLERANCE).all(dim=1) | (is_tied & (top_k < logits.shape[1]))
    if not bool(is_right.all()):
        raise RuntimeError(f"{name} is wrong in {int((~is_right).sum())} of {len(logits)} rows; it is not timed")


def memory_rate() -> float:
    """Bytes per microsecond, read plus written, of a large element-wise kernel on this device.

    A plain copy would not do: in a graph it becomes a memory node, which is slower than a kernel.
    """
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    timing = graph_times({"scale": lambda i: torch.mul(source, 1.5, out=target)}, calls=4, rounds=9)["scale"]
    return 2 * source.numel() * source.element_size() / timing.median


def host_cost(spec: RouterSpec, dtype: torch.dtype) -> dict[str, list[float]]:
    """Microseconds of the host for one eager call at T=1, beside a bare Triton launch of the same kernel."""
    from turnout.device.scores import EXACT
    from turnout.routing import triton as implementation

    logits = torch.randn(1, spec.num_experts, device="cuda").to(dtype)
    scale = torch.rand(spec.num_experts, device="cuda")
    contract, inputs = Contract(ids_dtype=torch.int64), RoutingInputs(per_expert_scale=scale)
    weights, ids, *_ = route(logits, spec, contract, inputs)
    tile = implementation.choose_tile(1, 1 << (spec.num_experts - 1).bit_length())
    tensors = RoutingTensors(per_expert_scale=scale)
    constants = implementation.constants_of(spec, contract, tensors, tile)
    arguments = (logits, *tensors, weights, ids, 1, logits.stride(0), *constants)
    calls = {
        "route": lambda: route(logits, spec, contract, inputs),
        "bare launch": lambda: implementation._route_kernel[(1, 1, 1)](*arguments, num_warps=tile.num_warps, **EXACT),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(12):
        for name, call in calls.items():
            samples[name].append(_host_time(call))
    return {name: [round(value, 2) for value in summary(times[2:])] for name, times in samples.items()}


def _host_time(call: Callable[[], object], calls: int = 300) -> float:
    """Microseconds of one call as the host sees it; few enough calls that the launch queue does not fill."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def table(result: dict[str, Any]) -> str:
    """The medians of a result as a Markdown table; microseconds."""
    variants = [name for name in result["rows"][0] if name not in ("num_tokens", "floor_us")]
    lines = [f"| tokens | {' | '.join(variants)} | bytes / bandwidth |", "|---:" * (len(variants) + 2) + "|"]
    for row in result["rows"]:
        medians = " | ".join(f"{row[name][0]:.2f}" for name in variants)
        lines.append(f"| {row['num_tokens']} | {medians} | {row['floor_us']:.2f} |")
    host = ", ".join(f"{name} {times[0]:.1f} us" for name, times in result["host"].items())
    return "\n".join([*lines, "", f"Host time of one eager call: {host}."])
