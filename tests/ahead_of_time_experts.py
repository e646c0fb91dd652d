"""The kernels of the experts and of combine, for ahead_of_time.py."""

import torch
from triton.compiler import ASTSource

from turnout.combine import triton as combine
from turnout.experts import grouped
from turnout.experts import triton as few
from turnout.spec import ExpertsSpec

POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
GEMMA4 = ExpertsSpec(activation="gelu_tanh")
GPT_OSS = ExpertsSpec(
    activation_alpha=1.702, activation_limit=7.0, up_offset=1.0, transposed=True, interleaved=True, bias=True
)
MODELS = {  # spec, dtype, top_k, num_experts, hidden_size, intermediate_size
    "gemma4": (GEMMA4, torch.bfloat16, 8, 128, 2816, 704),
    "gpt_oss": (GPT_OSS, torch.bfloat16, 4, 32, 2880, 2880),
    "float32": (ExpertsSpec(activation="gelu"), torch.float32, 2, 7, 100, 72),
}


def source(kernel, pointers, constants):
    """What Triton would compile; ``pointers`` by argument, absent ones left out."""
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | pointers
    signature |= {name: "i32" for name in ("num_slots", "num_blocks", "row_stride") if name in signature}
    given = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    return ASTSource(fn=kernel, signature=signature, constexprs=given)


def arguments(spec, dtype, top_k, num_experts, hidden_size, intermediate_size):
    """Pointers and constants that the kernels of the experts have in common."""
    float_type = POINTER[dtype]
    names = ("hidden_ptr", "weight_ptr", "weight", "activated_ptr", "out_ptr")
    pointers = {name: float_type for name in (*names, *(("bias_ptr",) if spec.bias else ()))}
    integers = ("ids_ptr", "sorted_token_ids_ptr", "expert_ids_ptr", "num_tokens_post_padded_ptr")
    pointers |= dict.fromkeys(integers, "*i32") | {"topk_weights_ptr": "*fp32"}
    constants = {
        "HIDDEN_STRIDE": hidden_size, "TOP_K": top_k, "NUM_EXPERTS": num_experts, "HIDDEN": hidden_size,
        "INTERMEDIATE": intermediate_size, "TRANSPOSED": spec.transposed, "INTERLEAVED": spec.interleaved,
        "ACTIVATION": spec.activation, "ALPHA": spec.activation_alpha, "LIMIT": spec.activation_limit,
        "UP_OFFSET": spec.up_offset, "IS_DESCRIPTOR": False,
    }  # fmt: skip
    return pointers, constants


def few_sources(name, model):
    spec, _, top_k, _, hidden_size, intermediate_size = model
    pointers, constants = arguments(*model)
    for kernel, tile in (
        (few._experts_gate_up_kernel, few.gate_up_tile(hidden_size, spec.transposed)),
        (few._experts_down_kernel, few.down_tile(intermediate_size, spec.transposed)),
    ):
        unroll = few.experts_at_once(top_k, intermediate_size, tile.columns)
        sizes = {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "UNROLL": unroll}
        taken = {each: kind for each, kind in pointers.items() if each in kernel.arg_names}
        yield (kernel.__name__, name), source(kernel, taken, constants | sizes)


def grouped_sources(name, model):
    pointers, constants = arguments(*model)
    for kernel, tiles in (
        (grouped._grouped_gate_up_kernel, grouped.GATE_UP_TILES),
        (grouped._grouped_down_kernel, grouped.DOWN_TILES),
    ):
        taken = {each: kind for each, kind in pointers.items() if each in kernel.arg_names}
        for rows in {"gemma4": (16, 64), "gpt_oss": (64,), "float32": (16,)}[name]:
            tile = tiles[rows] if name != "float32" else tiles[rows]._replace(depth=grouped.EXACT_DEPTH)
            sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M"), tile[:4], strict=True))
            if rows == 64 and name != "gpt_oss":
                kind = pointers["weight"].removeprefix("*")
                taken |= {"weight": f"tensordesc<{kind}[{tile.columns}, {tile.depth}]>"}
                sizes["IS_DESCRIPTOR"] = True
            yield (kernel.__name__, f"{name}_{rows}"), source(kernel, taken, constants | sizes)


def combine_source(with_ids, with_inverse):
    pointers = {"expert_out_ptr": "*bf16", "topk_weights_ptr": "*fp32", "out_ptr": "*bf16"}
    pointers |= {"ids_ptr": "*i64"} if with_ids else {}
    pointers |= {"inv_permuted_ptr": "*i32"} if with_inverse else {}
    constants = {"HIDDEN": 2816, "TOP_K": 8, "NUM_EXPERTS": 128, "BLOCK_H": 1024, "UNROLL": 8}
    return source(combine._combine_kernel, pointers, constants)


def sources():
    """Each kernel in each case."""
    found = {("_combine_kernel", f"{ids}_{inverse}"): combine_source(ids, inverse)
             for ids, inverse in ((False, True), (True, False))}  # fmt: skip
    for name, model in MODELS.items():
        found |= dict(few_sources(name, model)) | dict(grouped_sources(name, model))
    return found
