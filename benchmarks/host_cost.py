"""What the host does in one eager call of ``turnout.route`` on a GPU, part by part: microseconds at one token.

python benchmarks/host_cost.py

``route`` is checks and operator; the operator is dispatch, allocation and launch. ``launch, Triton's runner`` is the
launch without the short cut of `turnout.device.launch.launch_compiled`; ``bare launch`` is Triton's own of this kernel.
"""

import json
import statistics
from collections.abc import Callable

import torch

from turnout.bench.routing import _host_time, host_cost
from turnout.contracts import Contract
from turnout.device import launch as launches
from turnout.machine import environment
from turnout.routing import ops
from turnout.routing import triton as implementation
from turnout.routing.inputs import RoutingTensors
from turnout.spec import RouterSpec

ROUNDS = 12


def parts(spec: RouterSpec, dtype: torch.dtype) -> dict[str, float]:
    """The median of each part, timed in turns."""
    contract = Contract(ids_dtype=torch.int64)
    logits = torch.randn(1, spec.num_experts, device="cuda").to(dtype)
    scale = torch.rand(spec.num_experts, device="cuda")
    declarations, tensors = ops.declarations(spec, contract), RoutingTensors(per_expert_scale=scale)
    buffers = ops.allocate(logits, spec, contract)

    def launch() -> None:
        implementation.launch(logits, spec, contract, tensors, *buffers)

    def launch_as_triton_does() -> None:
        short_cut, launches._takes_usual_arguments = launches._takes_usual_arguments, lambda: False
        launch()
        launches._takes_usual_arguments = short_cut

    calls: dict[str, Callable[[], object]] = {
        "operator": lambda: ops.route(logits, declarations, "triton", scale, None, None, None),
        "allocation": lambda: ops.allocate(logits, spec, contract),
        "launch": launch,
        "launch, Triton's runner": launch_as_triton_does,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(_host_time(call))
    return {name: round(statistics.median(samples[2:]), 2) for name, samples in times.items()}


def main() -> None:
    """Print one line for each dtype of logits, then the machine."""
    spec = RouterSpec(num_experts=128, top_k=8, renormalize=True, per_expert_scale=True)
    print(f"the short cut fits this Triton: {launches._takes_usual_arguments()}")
    for dtype in (torch.float32, torch.bfloat16):
        found = {name: times[0] for name, times in host_cost(spec, dtype).items()}
        found["ratio"] = round(found["route"] / found["bare launch"], 3)
        print(dtype, json.dumps(found | parts(spec, dtype)))
    print(json.dumps(environment("cuda")))


if __name__ == "__main__":
    main()
