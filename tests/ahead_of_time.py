"""Compile turnout's Triton kernels for GPUs that are not there; run as a script by test_portability.py.

Prints one JSON object: for each kernel, target and case, the kinds of code that came out, and the Triton IR.
"""

import concurrent.futures
import json

import ahead_of_time_bench
import ahead_of_time_experts
import ahead_of_time_permutation
import ahead_of_time_quantized
import ahead_of_time_remap
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import turnout
from turnout.routing import triton as routing

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTER = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int16: "*i16", torch.int32: "*i32", torch.uint32: "*u32", torch.int64: "*i64",
}  # fmt: skip


def route_cases():
    """Arguments of `route_source`: between them every dtype, every optional tensor, both normalisations."""
    gemma4 = turnout.RouterSpec(num_experts=128, top_k=8, renormalize=True, per_expert_scale=True)
    qwen = turnout.RouterSpec(num_experts=60, top_k=5, weights_rounding="input", routed_scaling_factor=2.5)
    large = turnout.RouterSpec(num_experts=896, top_k=16, per_expert_scale=True)
    contract = turnout.Contract
    return {
        "gemma4": (gemma4, contract(ids_dtype=torch.int64), torch.float32, torch.bfloat16, (), 1),
        "gemma4_tile": (gemma4, contract(ids_dtype=torch.int32, sentinel=-1), torch.bfloat16, torch.float32,
                        ("num_valid_ptr",), 4),
        "qwen": (qwen, contract(ids_dtype=torch.int16, weights_dtype=torch.bfloat16, sentinel="num_experts"),
                 torch.bfloat16, None, ("is_padding_ptr",), 1),
        "large": (large, contract(ids_dtype=torch.uint32, weights_dtype=torch.float16), torch.float16, torch.float16,
                  (), 1),
    }  # fmt: skip


def route_source(spec, contract, logits_dtype, scale_dtype, padding, rows):
    """What Triton would compile for a call of `turnout.route`."""
    kernel = routing._route_kernel
    tile = routing.Tile(rows, 1)
    constants = routing.constants_of(logits_dtype, spec, contract, tile)
    constants = dict(zip(kernel.arg_names[-len(constants) :], constants, strict=True))
    pointers = {
        "logits_ptr": POINTER[logits_dtype],
        "scale_ptr": POINTER.get(scale_dtype),
        "is_padding_ptr": "*i1" if "is_padding_ptr" in padding else None,
        "num_valid_ptr": "*i32" if "num_valid_ptr" in padding else None,
        "expert_map_ptr": "*i32" if "expert_map_ptr" in padding else None,
        "weights_ptr": POINTER[contract.weights_dtype],
        "ids_ptr": POINTER[contract.ids_dtype],
    }
    constants |= {name: None for name, kind in pointers.items() if kind is None}
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {name: kind for name, kind in pointers.items() if kind is not None}
    signature |= {"num_tokens": "i32", "row_stride": "i32"}
    indices = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    return ASTSource(fn=kernel, signature=signature, constexprs={indices[k]: v for k, v in constants.items()})


def all_sources():
    sources = {("_route_kernel", name): route_source(*case) for name, case in route_cases().items()}
    for kernels in (
        ahead_of_time_bench,
        ahead_of_time_experts,
        ahead_of_time_permutation,
        ahead_of_time_quantized,
        ahead_of_time_remap,
    ):
        sources |= kernels.sources()
    return sources


def compile_for(target):
    """Every kernel in every case, for one target."""
    compiled = []
    for (kernel, case), source in all_sources().items():
        if target in ahead_of_time_quantized.NOT_FOR.get(case, ()):
            continue
        num_warps = 1 if kernel == "_route_kernel" else 4
        result = triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps})
        code = {kind: len(result.asm[kind]) for kind in ("cubin", "hsaco") if kind in result.asm}
        compiled.append({"kernel": kernel, "case": case, "target": target, "code": code, "ttir": result.asm["ttir"]})
    return compiled


def main():
    with concurrent.futures.ProcessPoolExecutor(max_workers=2) as pool:
        print(json.dumps([result for results in pool.map(compile_for, TARGETS) for result in results]))


if __name__ == "__main__":
    main()
