"""The tiles of the experts' kernels: each candidate checked, then timed, at Gemma 4 26B-A4B's sizes on a CUDA device.

python benchmarks/experts_tiles.py [--json FILE]

The tiles in turnout/experts/triton.py and grouped.py are the fastest of these, or within their spread. Weights of
twelve layers rotate, so that caches do not help; candidates are interleaved; graph replay; microseconds of one call,
median and quartiles. A candidate that needs more shared memory than there is, is absent.
"""

import argparse
import json
from collections.abc import Callable, Iterator

import torch
from triton.runtime.errors import OutOfResources

from turnout.bench.layer_case import Case, Geometry, draw_case, draw_layers
from turnout.bench.timing import graph_times
from turnout.experts import grouped
from turnout.experts import triton as few
from turnout.experts.api import contract_of
from turnout.machine import environment
from turnout.routing.api import route
from turnout.types import Routing, RoutingInputs

GEOMETRY = Geometry()
FEW_GATE_UP = [few.Tile(*tile) for tile in ((1, 4096, 4), (1, 4096, 8), (2, 4096, 8), (2, 1024, 4), (8, 256, 4))]
FEW_DOWN = [few.Tile(*tile) for tile in ((2, 256, 1), (4, 256, 2), (8, 256, 4), (2, 1024, 4), (4, 1024, 4))]
GATE_UP = {
    16: [(16, 32, 128, 1, 4, 4), (16, 64, 128, 1, 4, 4), (16, 32, 256, 1, 4, 3), (16, 128, 64, 1, 4, 4)],
    32: [(32, 64, 128, 1, 4, 3), (32, 64, 64, 1, 4, 4), (32, 128, 64, 1, 4, 4)],
    64: [(64, 64, 64, 1, 4, 4), (64, 128, 64, 1, 8, 4), (64, 64, 64, 8, 4, 4)],
    128: [(128, 128, 64, 4, 8, 4), (128, 128, 64, 4, 8, 3), (128, 128, 64, 16, 8, 4), (128, 64, 64, 4, 4, 4)],
}
DOWN = {
    16: [(16, 64, 128, 1, 4, 4), (16, 32, 128, 1, 4, 4), (16, 128, 64, 1, 4, 4)],
    32: [(32, 64, 128, 1, 4, 3), (32, 128, 64, 1, 4, 4)],
    64: [(64, 128, 64, 1, 4, 4), (64, 256, 64, 1, 8, 3), (64, 128, 64, 8, 4, 4)],
    128: [(128, 256, 64, 4, 8, 4), (128, 256, 64, 4, 8, 3), (128, 128, 64, 4, 8, 4)],
}
TOKENS = {16: 16, 32: 256, 64: 1024, 128: 4096}  # at which each size of block is used

Call = Callable[[int], torch.Tensor]


def few_calls(case: Case, routings: list[Routing]) -> Iterator[tuple[str, Call]]:
    """Both launches for few tokens, with one of the two tiles another than the one in use."""
    in_use = few.gate_up_tile, few.down_tile
    out = torch.empty_like(case.hidden_states[0])

    def call_with(gate_up: few.Tile, down: few.Tile) -> Call:
        def call(i: int) -> torch.Tensor:
            few.gate_up_tile, few.down_tile = (lambda *_: gate_up), (lambda *_: down)
            few._plan.cache_clear()
            given = case.at(i)
            spec = case.geometry.experts_spec
            few.launch(given.hidden_states, given.weights, routings[i % len(routings)], spec, out)
            few.gate_up_tile, few.down_tile = in_use
            few._plan.cache_clear()
            return out

        return call

    for tile in FEW_GATE_UP:
        yield f"gate_up {tuple(tile)}", call_with(tile, FEW_DOWN[0])
    for tile in FEW_DOWN[1:]:
        yield f"down {tuple(tile)}", call_with(FEW_GATE_UP[0], tile)


def grouped_calls(case: Case, routings: list[Routing], rows: int) -> Iterator[tuple[str, Call]]:
    """Each of the two grouped GEMMs by itself, with each tile for blocks of so many rows."""
    slots, spec = case.num_tokens * GEOMETRY.top_k, case.geometry.experts_spec
    like = case.hidden_states
    values = like.new_empty(slots, GEOMETRY.intermediate_size)
    outputs = like.new_empty(slots, GEOMETRY.hidden_size)
    drawn = torch.randn_like(values)

    def gate_up_with(tile: grouped.Tile) -> Call:
        def call(i: int) -> torch.Tensor:
            grouped.GATE_UP_TILES[rows] = tile
            given, blocks = case.at(i), routings[i % len(routings)].permutation
            grouped._launch_gate_up(given.hidden_states, given.weights, spec, blocks, values, GEOMETRY.top_k)
            return values

        return call

    def down_with(tile: grouped.Tile) -> Call:
        def call(i: int) -> torch.Tensor:
            grouped.DOWN_TILES[rows] = tile
            blocks = routings[i % len(routings)].permutation
            grouped._launch_down(drawn, case.at(i).weights, spec, blocks, outputs)
            return outputs

        return call

    for tile in GATE_UP[rows]:
        yield f"gate_up {tile}", gate_up_with(grouped.Tile(*tile))
    for tile in DOWN[rows]:
        yield f"down {tile}", down_with(grouped.Tile(*tile))


def checked(calls: Iterator[tuple[str, Call]]) -> dict[str, Call]:
    """The calls whose result is that of the first one of the same kind."""
    kept: dict[str, Call] = {}
    results: dict[str, torch.Tensor] = {}
    for name, call in calls:
        try:
            result = call(0).float().clone()
        except OutOfResources as error:
            print(f"{name} is absent: {error}")
            continue
        expected = results.setdefault(name.split()[0], result)
        error = ((result - expected).norm() / expected.norm()).item()
        if not error < 1e-3:
            raise RuntimeError(f"{name} errs by {error} and is not timed")
        kept[name] = call
    return kept


def main() -> None:
    """Print the times, fastest first, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file to write")
    arguments = parser.parse_args()
    generator = torch.Generator(device="cuda").manual_seed(0)
    layers = draw_layers(GEOMETRY, 12, generator)
    record = {"environment": environment("cuda"), "what": __doc__, "rows": []}
    for tokens, rows in [(1, None), (8, None), *((tokens, rows) for rows, tokens in TOKENS.items())]:
        case = draw_case(GEOMETRY, tokens, "uniform", layers, generator)
        impl = "triton" if rows is None else "grouped"
        contract = contract_of(impl, tokens * GEOMETRY.top_k, GEOMETRY.num_experts)
        assert contract.block_size == rows, "blocks of the size that these tokens get"
        routings = [
            route(logits, GEOMETRY.router_spec, contract, RoutingInputs(per_expert_scale=layers[0][1]))
            for logits in case.router_logits
        ]
        calls = few_calls(case, routings) if rows is None else grouped_calls(case, routings, rows)
        times = graph_times(checked(calls), calls=24 if tokens <= 256 else 12, rounds=9)
        print(f"{tokens} tokens, {impl}")
        for name, timing in sorted(times.items(), key=lambda item: item[1]):
            print(f"  {name:34} {timing.median:8.2f} us")
        record["rows"].append({"tokens": tokens, "impl": impl, "us": times})
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
