"""What structures cost on a GPU, beside the ways that consumers make them; and triton_kernels' layer with and without.

python benchmarks/permutation_times.py [--json FILE]

Graph replay, logits drawn anew for each call of a graph, variants interleaved. The structures that routing writes are
checked before they are timed, up to 4096 tokens. Peers: plain torch (stable sort, searchsorted), vLLM's
moe_align_block_size and triton_kernels' own routing where these are importable (PYTHONPATH with a folder that holds
vllm/ is enough for the second).
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

import turnout
from turnout.bench.timing import graph_times, launches
from turnout.contracts import PADDED_BLOCK_MAP
from turnout.integrations import triton_kernels
from turnout.machine import environment
from turnout.permutation import triton as kernels
from turnout.testing.permutation import assert_permutation_matches

CALLS, TOKENS = 20, (1, 16, 128, 129, 1024, 4096, 16384)
GEMMA4 = turnout.RouterSpec(num_experts=128, top_k=8, renormalize=True)
GPT_OSS = turnout.RouterSpec(num_experts=32, top_k=4, renormalize=True)
PLAIN = turnout.Contract(sentinel=-1)
PERMUTED = turnout.Contract(sentinel=-1, structures=("expert_offsets", "permuted_idx", "inv_permuted_idx"))
BLOCKS = turnout.Contract(sentinel=-1, structures=PADDED_BLOCK_MAP, block_size=64)

Calls = dict[str, Callable[[int], object]]


def checked(logits: torch.Tensor, spec: turnout.RouterSpec, contract: turnout.Contract) -> turnout.Routing:
    """A routing whose structures are the oracle's."""
    routing = turnout.route(logits, spec, contract)
    if contract.structures and len(logits) <= 4096:
        assert_permutation_matches(routing, routing.topk_ids, spec.num_experts, contract, routing.topk_weights)
    return routing


def torch_permutation(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Offsets, order and its inverse as torch-native experts compute them."""
    sorted_ids, order = torch.sort(ids.flatten(), stable=True)
    offsets = torch.searchsorted(sorted_ids, torch.arange(129, device=ids.device, dtype=ids.dtype))
    return offsets, order, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))


def gemma4_calls(num_tokens: int) -> Calls:
    """Routing alone, routing with structures, permute alone, and peers."""
    batches = torch.randn(CALLS, num_tokens, 128, device="cuda")
    ids = [checked(logits, GEMMA4, PLAIN).topk_ids for logits in batches]
    for contract in (PERMUTED, BLOCKS):
        checked(batches[0], GEMMA4, contract)
    calls: Calls = {
        "route": lambda i: turnout.route(batches[i], GEMMA4, PLAIN),
        "route, permuted": lambda i: turnout.route(batches[i], GEMMA4, PERMUTED),
        "route, blocks": lambda i: turnout.route(batches[i], GEMMA4, BLOCKS),
        "permute, permuted": lambda i: turnout.permute(ids[i], 128, PERMUTED),
        "permute, blocks": lambda i: turnout.permute(ids[i], 128, BLOCKS),
        "torch, permuted": lambda i: torch_permutation(ids[i]),
    }
    try:
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    except ImportError:
        return calls
    return calls | {"vLLM, blocks": lambda i: moe_align_block_size(ids[i], 64, 128)}


def gpt_oss_calls(num_tokens: int) -> Calls:
    """All that matmul_ogs reads, from logits: turnout's launches beside the library's."""
    batches = torch.randn(CALLS, num_tokens, 32, device="cuda").bfloat16()
    checked(batches[0], GPT_OSS, triton_kernels.CONTRACT)
    calls: Calls = {"route, matmul_ogs": lambda i: turnout.route(batches[i], GPT_OSS, triton_kernels.CONTRACT)}
    try:
        routing = triton_kernels.library("routing").routing
    except ImportError:
        return calls
    return calls | {"triton_kernels' routing": lambda i: routing(batches[i], 4)}


def shares_calls(num_tokens: int) -> Calls:
    """`turnout.permute` with other shares: slots of a tile and warps."""
    ids = [checked(torch.randn(num_tokens, 128, device="cuda"), GEMMA4, PLAIN).topk_ids for _ in range(CALLS)]
    chosen = kernels.share_out

    def with_shares(tile: int, num_warps: int, most: int) -> Callable[[int], object]:
        def share_out(num_slots: int, num_experts: int) -> kernels.Shares:
            tiles = -(-num_slots // tile)
            each = -(-tiles // most)
            return kernels.Shares(-(-tiles // each), each * tile, tile, num_warps)

        def call(i: int) -> object:
            kernels.share_out = share_out
            try:
                return turnout.permute(ids[i], 128, PERMUTED)
            finally:
                kernels.share_out = chosen

        return call

    return {
        f"tile {tile}, {num_warps} warps, {most} programs": with_shares(tile, num_warps, most)
        for tile, num_warps in ((128, 1), (128, 4), (256, 2), (256, 4), (512, 4), (512, 8), (1024, 8))
        for most in (64, 132, 256, 512)
    }


def host_us(call: Callable[[int], object]) -> float:
    """Microseconds of the host for one eager call."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for i in range(300):
        call(i % CALLS)
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return elapsed / 300 * 1e6


def main() -> None:
    """Print a table, and write it where asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--shares", action="store_true", help="try tiles, warps and programs of the two launches")
    options = parser.parse_args()
    rows = []
    for num_tokens in TOKENS[3:] if options.shares else TOKENS:
        for calls in (shares_calls,) if options.shares else (gemma4_calls, gpt_oss_calls):
            variants = calls(num_tokens)
            for name, timing in graph_times(variants, calls=CALLS).items():
                host = host_us(variants[name]) if num_tokens == 1 else None
                rows.append([num_tokens, name, *timing, launches(variants[name]), host])
                print(f"{num_tokens:6} {name:32} {timing.median:8.2f} us, {rows[-1][-2]} launches", end="")
                print("" if host is None else f", host {host:.1f} us", flush=True)
    if options.json:
        columns = ["num_tokens", "name", "median_us", "lower_us", "upper_us", "launches", "host_us"]
        with open(options.json, "w") as file:
            json.dump({"environment": environment("cuda"), "columns": columns,
                       "rows": rows}, file, indent=1)  # fmt: skip


if __name__ == "__main__":
    main()
