"""Tensor-parallel vLLM on two GPUs: the tokens of one GPU, and the time of an output token, stock and turnout in turns.

python benchmarks/vllm_tensor_parallel.py [--rounds 20] [--json FILE]

Needs two CUDA devices and turnout installed beside vLLM, whose workers find the plugin by its entry point. First a
Gemma 4 of four layers in float32, eager: greedy tokens on one GPU and on two, stock and routed (two GPUs add in another
order, which alone may change one). Then the geometry of Gemma 4 26B-A4B with drawn weights on two GPUs in CUDA graphs,
one set for each mode: milliseconds of a decode step, median, and the change from stock with the 95% interval of its
median.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from turnout.bench.scenario_models import draw_weights, find_checkpoint, read_vocab_size
from turnout.bench.verdict import change_of
from turnout.bench.vllm_engine import DECODED_TOKENS, Load, engine_options, prepare_environment, submit
from turnout.bench.vllm_graphs import capture_graphs, replay_graphs
from turnout.machine import environment

MODES = ("off", "routing", "layer")
REQUESTS, PROMPT_TOKENS, STEPS = (1, 16), 128, 16
SMALL = Load(requests=(16,), prompt_tokens=32)
ENVIRONMENT = {
    "VLLM_PLUGINS": "turnout",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions of this file run in the workers
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # no NVLink multicast
}


def use(worker: Any, mode: str) -> None:
    """In a worker: run in this mode from now on, with its graphs if there are some."""
    from turnout.integrations import vllm as plugin

    plugin.use(mode)
    graphs = getattr(worker.model_runner, "graphs_of_modes", {})
    if mode in graphs:
        replay_graphs(graphs[mode])


def capture(worker: Any, mode: str) -> None:
    """In a worker: capture the graphs of the mode that is in use."""
    runner = worker.model_runner
    runner.graphs_of_modes = {**getattr(runner, "graphs_of_modes", {}), mode: capture_graphs(runner)}


def draw(worker: Any) -> None:
    """In a worker: weights that route evenly, the same router on each rank."""
    draw_weights(worker.model_runner.get_model())


def explained(worker: Any) -> str:
    """In a worker: what turnout does in its layers."""
    from turnout.integrations import vllm as plugin

    return str(plugin.explain())


def open_engine(name: str, folder: str, load: Load, ranks: int, **options: Any) -> tuple[Any, torch.Tensor]:
    """A model in vLLM on so many GPUs, and prompts."""
    os.environ.update(ENVIRONMENT)
    prepare_environment()
    import cloudpickle
    from vllm import LLM

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    checkpoint = find_checkpoint(name, Path(folder))
    is_eager = options.get("enforce_eager", False)
    settings = engine_options(checkpoint, torch.device("cuda"), load, is_eager=is_eager)
    llm = LLM(**settings | {"tensor_parallel_size": ranks, "disable_custom_all_reduce": False} | options)
    rng = torch.Generator().manual_seed(0)
    size = max(load.requests), load.prompt_tokens
    return llm, torch.randint(read_vocab_size(checkpoint), size, generator=rng)


def small_tokens(ranks: int, queue: Any) -> None:
    """In a process of its own: the tokens of both modes."""
    with tempfile.TemporaryDirectory() as folder:
        llm, prompts = open_engine("gemma4-4-layers", folder, SMALL, ranks, enforce_eager=True, dtype="float32")
    tokens = {}
    for mode in ("off", "routing"):
        llm.collective_rpc(use, args=(mode,))
        submit(llm.llm_engine, prompts, 32)
        finished: dict[str, list[int]] = {}
        while llm.llm_engine.has_unfinished_requests():
            finished |= {
                each.request_id: list(each.outputs[0].token_ids) for each in llm.llm_engine.step() if each.finished
            }
        tokens[mode] = [finished[name] for name in sorted(finished, key=int)]
    queue.put((tokens, llm.collective_rpc(explained)))


def in_a_process(function: Callable[..., None], *arguments: Any) -> Any:
    """What a function puts into the queue that it is handed last."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    while process.is_alive() and queue.empty():
        time.sleep(0.5)
    if queue.empty():
        raise RuntimeError(f"{function.__name__}{arguments} ended without a result, exit code {process.exitcode}")
    result = queue.get()
    process.join(30)
    process.kill()
    return result


def step_times(llm: Any, prompts: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a decode step of each mode, the modes in turns on the same requests."""
    engine, left = llm.llm_engine, 0
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            if left < STEPS + 4:  # vLLM may be two steps ahead
                while engine.has_unfinished_requests():
                    engine.step()
                submit(engine, prompts, DECODED_TOKENS)
                started: set[str] = set()
                while len(started) < len(prompts):
                    started |= {output.request_id for output in engine.step()}
                left = DECODED_TOKENS - 4
            llm.collective_rpc(use, args=(mode,))
            engine.step()
            engine.step()
            start = time.perf_counter()
            for _ in range(STEPS):
                engine.step()
            times[mode].append((time.perf_counter() - start) * 1e3 / STEPS)
            left -= STEPS + 2
    return times


def large_times(rounds: int, queue: Any) -> None:
    """In a process of its own: the second part."""
    load = Load(requests=REQUESTS, prompt_tokens=PROMPT_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        llm, prompts = open_engine("gemma4-26b", folder, load, 2, additional_config={"turnout": "layer"})
        llm.collective_rpc(draw)
        for mode in MODES:
            llm.collective_rpc(use, args=(mode,))
            submit(llm.llm_engine, prompts[:1], 2)
            while llm.llm_engine.has_unfinished_requests():  # compiles kernels, which a capture must not
                llm.llm_engine.step()
            llm.collective_rpc(capture, args=(mode,))
        times = {requests: step_times(llm, prompts[:requests], rounds) for requests in REQUESTS}
        queue.put((times, llm.collective_rpc(explained)))


def main() -> None:
    """Print both parts, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="file to write")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"environment": environment("cuda"), "what": __doc__}
    (one, _), (two, plan) = in_a_process(small_tokens, 1), in_a_process(small_tokens, 2)
    stock = one["off"]
    record["gemma4-4-layers"] = {
        "plan of each rank": plan,
        "requests with the tokens of stock on one GPU": {
            "stock on two": sum(a == b for a, b in zip(stock, two["off"], strict=True)),
            "routed on one": sum(a == b for a, b in zip(stock, one["routing"], strict=True)),
            "routed on two": sum(a == b for a, b in zip(stock, two["routing"], strict=True)),
            "of": len(stock),
        },
        "requests with the tokens of stock on two GPUs": {
            "routed on two": sum(a == b for a, b in zip(two["off"], two["routing"], strict=True)),
            "of": len(stock),
        },
    }
    print(json.dumps(record["gemma4-4-layers"], indent=1), flush=True)
    times, plan = in_a_process(large_times, arguments.rounds)
    record["gemma4-26b"] = {"plan of each rank": plan, "rows": []}
    for requests, of_modes in times.items():
        for mode, samples in of_modes.items():
            change = change_of([after / before - 1 for before, after in zip(of_modes["off"], samples, strict=True)])
            print(f"{requests:3} requests, {mode:8} {statistics.median(samples):6.2f} ms, {change}", flush=True)
            row = {"requests": requests, "mode": mode, "ms": samples, "change": change}
            record["gemma4-26b"]["rows"].append(row)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
