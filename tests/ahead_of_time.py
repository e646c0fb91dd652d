"""Compile turnout's Triton kernels for GPUs that are not there; run as a script by test_portability.py.

Prints one JSON object: for each kernel, target and case, the kinds of code that came out, and the Triton IR.
"""

import concurrent.futures
import dataclasses
import json

import ahead_of_time_bench
import ahead_of_time_experts
import ahead_of_time_permutation
import ahead_of_time_quantized
import ahead_of_time_remap
import ahead_of_time_router
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import turnout
from turnout.device.scores import EXACT
from turnout.routing import triton as routing
from turnout.routing.inputs import RoutingTensors

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTER = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1",
    torch.int16: "*i16", torch.int32: "*i32", torch.uint32: "*u32", torch.int64: "*i64",
}  # fmt: skip
ROWS = 64  # of the tensors of a case that have one for each token


def route_cases():
    """Arguments of `route_source`: between them every dtype, every optional tensor, every score and weight."""
    gemma4 = turnout.RouterSpec(num_experts=128, top_k=8, renormalize=True, per_expert_scale=True)
    qwen = turnout.RouterSpec(num_experts=60, top_k=5, weights_rounding="input", routed_scaling_factor=2.5)
    large = turnout.RouterSpec(num_experts=896, top_k=16, per_expert_scale=True)
    contract = turnout.Contract
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    int16, int32, int64 = torch.int16, torch.int32, torch.int64
    return {
        "gemma4": (gemma4, contract(ids_dtype=int64), float32, 1, given(per_expert_scale=(bfloat16, 128))),
        "gemma4_tile": (gemma4, contract(ids_dtype=int32, sentinel=-1), bfloat16, 4,
                        given(per_expert_scale=(float32, 128), num_valid_tokens=(int32, 1))),
        "qwen": (qwen, contract(ids_dtype=int16, weights_dtype=bfloat16, sentinel="num_experts"), bfloat16, 1,
                 given(is_padding=(torch.bool, ROWS))),
        "large": (large, contract(ids_dtype=torch.uint32, weights_dtype=float16), float16, 1,
                  given(per_expert_scale=(float16, 896))),
        **family_cases(),
    }  # fmt: skip


def family_cases():
    """Routers that rank scores, have groups or tables, and experts with replicas."""
    spec, contract = turnout.RouterSpec, turnout.Contract()
    physical = turnout.Contract(sentinel=-1, id_space="physical")
    float32, bfloat16, int32, int64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
    deepseek_v3 = spec(
        num_experts=256, top_k=8, scoring_func="sigmoid", e_score_correction_bias=True, num_expert_group=8,
        topk_group=4, group_score="top2_sum", group_fill="zero", renormalize=True, renormalize_eps=1e-20,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    ernie = spec(num_experts=64, top_k=6, e_score_correction_bias=True, renormalize=True, renormalize_min=1e-12)
    gpt_oss = spec(num_experts=128, top_k=4, scoring_func="none", selected_score="softmax", weights_rounding="input")
    deepseek_v4 = spec(
        num_experts=256, top_k=6, scoring_func="sqrtsoftplus", renormalize=True, routed_scaling_factor=1.5
    )  # fmt: skip
    kolibri = spec(
        num_experts=384, top_k=6, scoring_func="sigmoid", e_score_correction_bias=True, score_dtype="input",
        logit_softcap=30.0, logit_scale=0.5, divide_by_top_k=True,
    )  # fmt: skip
    grouped = spec(num_experts=192, top_k=6, num_expert_group=8, topk_group=3)
    return {
        "deepseek_v3": (deepseek_v3, contract, float32, 1, given(e_score_correction_bias=(float32, 256))),
        "ernie": (ernie, contract, float32, 4, given(e_score_correction_bias=(float32, 64))),
        "gpt_oss": (gpt_oss, contract, bfloat16, 1, given()),
        "deepseek_v4": (dataclasses.replace(deepseek_v4, e_score_correction_bias=True), contract, float32, 1,
                        given(e_score_correction_bias=(bfloat16, 256))),
        "hash_table": (dataclasses.replace(deepseek_v4, hash_routing=True), contract, float32, 1,
                       given(input_ids=(int64, ROWS), given_ids=(int64, 1000, 6))),
        "replay": (gpt_oss, contract, bfloat16, 1, given(given_ids=(torch.int16, ROWS, 4))),
        "kolibri": (kolibri, contract, torch.float16, 1, given(e_score_correction_bias=(torch.float16, 384))),
        "grouped": (grouped, contract, bfloat16, 1, given()),
        "eplb": (grouped, physical, float32, 1,
                 given(logical_to_physical_map=(int64, 192, 3), logical_replica_count=(int64, 192),
                       record_load=(torch.bool, 1), num_counted_tokens=(int32, 1), expert_load=(int32, 200),
                       replay_ids=(torch.int16, ROWS, 6))),
    }  # fmt: skip


def given(**tensors):
    """Tensors of a call, without memory: a dtype and a shape for each."""
    made = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, *shape) in tensors.items()}
    return RoutingTensors(**made)


def route_source(spec, contract, logits_dtype, rows, tensors):
    """What Triton would compile for a call of `turnout.route`."""
    kernel = routing._route_kernel
    constants = routing.constants_of(spec, contract, tensors, routing.Tile(rows, 1))
    dtypes = [logits_dtype, *(getattr(t, "dtype", None) for t in tensors), contract.weights_dtype, contract.ids_dtype]
    kinds = [*(POINTER.get(dtype, "constexpr") for dtype in dtypes), "i32", "i32", *["constexpr"] * len(constants)]
    signature = dict(zip(kernel.arg_names, kinds, strict=True))
    values = [None] * (len(kinds) - len(constants)) + list(constants)
    constexprs = {(i,): value for i, (kind, value) in enumerate(zip(kinds, values, strict=True)) if kind == "constexpr"}
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs)


def all_sources():
    sources = {("_route_kernel", name): route_source(*case) for name, case in route_cases().items()}
    for kernels in (
        ahead_of_time_bench,
        ahead_of_time_experts,
        ahead_of_time_permutation,
        ahead_of_time_quantized,
        ahead_of_time_remap,
        ahead_of_time_router,
    ):
        sources |= kernels.sources()
    return sources


def compile_for(target):
    """Every kernel in every case, for one target."""
    compiled = []
    for (kernel, case), source in all_sources().items():
        if target in ahead_of_time_quantized.NOT_FOR.get(case, ()):
            continue
        options = {"num_warps": 1 if kernel == "_route_kernel" else 4}
        if kernel in ("_route_kernel", "_route_permute_kernel"):
            options |= EXACT
        result = triton.compile(source, target=TARGETS[target], options=options)
        code = {kind: len(result.asm[kind]) for kind in ("cubin", "hsaco") if kind in result.asm}
        compiled.append({"kernel": kernel, "case": case, "target": target, "code": code, "ttir": result.asm["ttir"]})
    return compiled


def main():
    with concurrent.futures.ProcessPoolExecutor(max_workers=2) as pool:
        print(json.dumps([result for results in pool.map(compile_for, TARGETS) for result in results]))


if __name__ == "__main__":
    main()
