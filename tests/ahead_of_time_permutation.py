"""The kernels of the permutation, for ahead_of_time.py."""

import torch
from triton.compiler import ASTSource

from turnout.contracts import STRUCTURES, Contract
from turnout.permutation import triton as permutation
from turnout.routing import triton as routing
from turnout.spec import RouterSpec

POINTER = {torch.int16: "*i16", torch.int32: "*i32", torch.uint32: "*u32", torch.int64: "*i64"}
REMAP = ("tokens_per_expert", "inv_permuted_idx")  # through a map
CASES = {  # ids, integers of the structures, which of them, num_experts, top_k, block_size
    "everything": (torch.int32, torch.int32, STRUCTURES, 60, 6, 48),
    "mapped": (torch.int64, torch.int32, REMAP, 60, 6, 1),
    "some_in_64_bits": (torch.uint32, torch.int64, ("expert_offsets", "inv_permuted_idx"), 128, 8, 1),
}
TILE = 32  # slots that are sorted together; more would take longer to compile


def source(kernel, ids_dtype, structures_dtype, structures, num_experts, top_k, block_size):
    """What Triton would compile for a call of `turnout.permute`, or of `turnout.route` with structures."""
    pointers = {f"{name}_ptr": POINTER[structures_dtype] for name in structures}
    pointers |= {"ids_ptr": POINTER[ids_dtype], "counts_ptr": "*i32"}
    if "bitmatrix" in structures:
        pointers["bitmatrix_ptr"] = "*u32"
    if "permuted_weights" in structures:
        pointers |= {"weights_ptr": "*bf16", "permuted_weights_ptr": "*bf16"}
    if kernel is permutation._route_permute_kernel:
        pointers |= {"logits_ptr": "*bf16", "weights_ptr": "*bf16", "num_valid_ptr": "*i32"}
        pointers |= {"expert_map_ptr": "*i32"} if structures_dtype == torch.int64 else {}
    elif structures == REMAP:
        pointers["map_ptr"] = "*i32"
    spec = RouterSpec(num_experts=num_experts, top_k=top_k, renormalize=True)
    numbers = {"num_tokens": "i32", "map_size": "i32", "run": "i32", "row_stride": "i32"}
    constants = {
        "NUM_EXPERTS": num_experts, "TOP_K": top_k, "BLOCK_SIZE": block_size, "BLOCK_S": TILE,
        "BLOCK_E": permutation.experts_of_tile(num_experts), "BLOCK_K": permutation._next_power_of_2(top_k),
        "RECIPE": routing.recipe_of(spec, Contract(sentinel="num_experts"), 0, 0, 0), "BLOCK_T": 4,
        "BLOCK_LOGITS": permutation._next_power_of_2(num_experts),
    }  # fmt: skip
    signature = {name: (pointers | numbers).get(name, "constexpr") for name in kernel.arg_names}
    given = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    return ASTSource(fn=kernel, signature=signature, constexprs=given)


def sources():
    """Every kernel, with what is slow to compile once."""
    every, mapped, some = CASES.values()
    return {
        ("_permute_kernel", "some_in_64_bits"): source(permutation._permute_kernel, *some),
        ("_route_permute_kernel", "everything"): source(permutation._route_permute_kernel, *every),
        ("_route_permute_kernel", "local_ids"): source(permutation._route_permute_kernel, *some),
        ("_count_kernel", "everything"): source(permutation._count_kernel, *every),
        ("_place_kernel", "everything"): source(permutation._place_kernel, *every),
        ("_permute_kernel", "mapped"): source(permutation._permute_kernel, *mapped),
        ("_count_kernel", "mapped"): source(permutation._count_kernel, *mapped),
        ("_place_kernel", "mapped"): source(permutation._place_kernel, *mapped),
    }
