"""The router's projection of few tokens: one launch of turnout's against torch's GEMM, on a CUDA device.

python benchmarks/project_times.py [--json FILE]

Gemma 4 26B-A4B's sizes, bfloat16, weights of thirty layers rotated, graph replay, results compared before timing;
microseconds of one call, median and quartiles. "float32" is vLLM's projection alone (bfloat16 to float32); "gemma4" is
transformers' with norm and scale before it, which torch takes a launch each for. `FEW_TOKENS` in
turnout/router/api.py is the largest number of tokens at which the launch takes less than both GEMMs.
"""

import argparse
import json
from collections.abc import Callable

import torch

from turnout.bench.timing import graph_times
from turnout.machine import environment
from turnout.router import ops
from turnout.router.reference import project_reference
from turnout.spec import RouterSpec
from turnout.types import RouterWeights

HIDDEN, EXPERTS, LAYERS = 2816, 128, 30
SPEC = RouterSpec(num_experts=EXPERTS, top_k=8, input_norm="rms_scale")


def variants(tokens: int) -> dict[str, Callable[[int], torch.Tensor]]:
    """Calls by name; call(i) is on the weights of layer i."""
    rng = torch.Generator("cuda").manual_seed(tokens)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=rng).bfloat16()

    hidden_states, scale = drawn(tokens, HIDDEN), drawn(HIDDEN)
    weights = [drawn(EXPERTS, HIDDEN) / 50 for _ in range(LAYERS)]
    routers = [RouterWeights(each, scale=scale) for each in weights]
    return {
        "float32, torch": lambda i: torch.mm(hidden_states, weights[i % LAYERS].T, out_dtype=torch.float32),
        "float32, turnout": lambda i: ops.project(hidden_states, weights[i % LAYERS], None, None, 0.0, True),
        "gemma4, torch": lambda i: project_reference(hidden_states, routers[i % LAYERS], SPEC),
        "gemma4, turnout": lambda i: ops.project(hidden_states, *routers[i % LAYERS], SPEC.input_norm_eps, False),
    }


def check(calls: dict[str, Callable[[int], torch.Tensor]]) -> None:
    """Refuse to time what computes something else."""
    for kind, tolerance in (("float32", 1e-4), ("gemma4", 2e-2)):
        want, got = (calls[f"{kind}, {who}"](0).float() for who in ("torch", "turnout"))
        error = ((got - want).norm() / want.norm()).item()
        if not error < tolerance:
            raise RuntimeError(f"{kind} errs by {error} and is not timed")


def main() -> None:
    """Print one line for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file to write")
    arguments = parser.parse_args()
    record = {"environment": environment("cuda"), "what": __doc__, "rows": []}
    for tokens in (1, 2, 4, 8, 16):
        calls = variants(tokens)
        check(calls)
        times = graph_times(calls, calls=LAYERS * 2, rounds=20)
        print(tokens, {name: round(timing.median, 2) for name, timing in times.items()}, flush=True)
        record["rows"].append({"tokens": tokens, "us": times})
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
