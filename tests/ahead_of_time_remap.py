"""The kernels that remap rows and run experts on them, for ahead_of_time.py."""

import torch
from triton.compiler import ASTSource

from turnout.permutation.triton import experts_of_tile
from turnout.remap import triton as remap

POINTER = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.uint8: "*u8", torch.int16: "*i16",
}  # fmt: skip
NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, SCALES = 60, 6, 96, 80, 3
COPY = {"16_bits": (torch.int16, None), "mxfp8": (torch.uint8, torch.uint8)}  # rows, scales
GEMM = {  # dtype, activation (None: the down projection), transposed, interleaved, bias
    "gelu_tanh": (torch.float16, "gelu_tanh", False, False, False),
    "swigluoai": (torch.bfloat16, "silu", True, True, True),
    "down": (torch.float32, None, False, False, True),
}


def sources():
    """Each kernel in each case, as `turnout.remap` launches it."""
    block_e, found = experts_of_tile(NUM_EXPERTS), {}
    for case, (rows, scales) in COPY.items():
        pointers = {name: POINTER[rows] for name in ("hidden_ptr", "rows_ptr")}
        pointers |= {name: scales and POINTER[scales] for name in ("scales_ptr", "row_scales_ptr")}
        pointers |= {"positions_ptr": "*i32", "tokens_per_expert_ptr": "*i32"}
        constants = {
            "ROW_STRIDE": 2 * HIDDEN, "SCALES_STRIDE": SCALES, "TOP_K": TOP_K, "HIDDEN": HIDDEN, "SCALES": SCALES,
            "NUM_EXPERTS": NUM_EXPERTS, "BLOCK_E": block_e, "BLOCK_T": 1, "BLOCK_H": 128,
        }  # fmt: skip
        found["_copy_rows_kernel", case] = source(remap._copy_rows_kernel, pointers, constants)
    return found | {("_remapped_gemm_kernel", case): gemm(*arguments) for case, arguments in GEMM.items()}


def gemm(dtype, activation, transposed, interleaved, bias):
    """One of the two GEMMs."""
    columns, outs = (HIDDEN, INTERMEDIATE) if activation else (INTERMEDIATE, HIDDEN)
    rows = 2 * outs if activation else outs
    pointers = dict.fromkeys(("rows_ptr", "weight_ptr", "out_ptr"), POINTER[dtype])
    pointers |= {"bias_ptr": POINTER[dtype] if bias else None, "counts_ptr": "*i32"}
    constants = {
        "EXPERT_STRIDE": rows * columns, "ROW_STRIDE": 1 if transposed else columns,
        "COLUMN_STRIDE": rows if transposed else 1, "IN": columns, "OUT": outs, "GATED": activation is not None,
        "INTERLEAVED": interleaved, "ACTIVATION": activation or "none", "ALPHA": 1.702 if interleaved else 1.0,
        "LIMIT": 7.0 if interleaved else None, "UP_OFFSET": 1.0 if interleaved else 0.0, "NUM_EXPERTS": NUM_EXPERTS,
        "BLOCK_E": experts_of_tile(NUM_EXPERTS), "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32,
    }  # fmt: skip
    return source(remap._remapped_gemm_kernel, pointers, constants)


def source(kernel, pointers, constants):
    """What Triton would compile for a call; numbers are those of 32 bits that it does not specialise on."""
    numbers = dict.fromkeys(("num_tokens", "num_rows"), "i32")
    signature = {name: (pointers | numbers).get(name) or "constexpr" for name in kernel.arg_names}
    given = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    return ASTSource(fn=kernel, signature=signature, constexprs=given)
