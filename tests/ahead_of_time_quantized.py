"""The kernels of quantised experts, for ahead_of_time.py: every scheme, as `turnout.experts` launches it."""

import torch
from triton.compiler import ASTSource

import turnout
from turnout.experts import _triton_quantized as quantized
from turnout.experts.quantization import limits

POINTER = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
# Name: quantization, group_size, dtypes of hidden states, values and weights, those of scales and ids, many tokens.
CASES = {
    "w4a16": ("w4a16", 32, torch.bfloat16, torch.bfloat16, torch.int32, torch.bfloat16, torch.int32, False),
    "w4a16 grouped": ("w4a16", 128, torch.float16, torch.float16, torch.int32, torch.float32, torch.int64, True),
    "w4a8_int8": ("w4a8_int8", 32, torch.float32, torch.int8, torch.int32, torch.float16, torch.int64, False),
    "w8a8_int8": ("w8a8_int8", None, torch.bfloat16, torch.int8, torch.int8, torch.bfloat16, torch.int32, True),
    "w8a8_fp8": ("w8a8_fp8", None, torch.bfloat16, torch.uint8, torch.uint8, torch.float32, torch.int32, True),
    "float8": (
        "w8a8_fp8", None, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float32, torch.int32, False,
    ),
}  # fmt: skip
NOT_FOR = {"float8": ("sm80", "gfx942")}
"""Cases and the targets that have no such multiplication: `multiplies_float8` is False there."""
NUM_WARPS = 4
HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 384, 256, 6, 2


def sources():
    """What Triton would compile for calls of `turnout.experts`."""
    found = {}
    for name, case in CASES.items():
        found |= {(kernel.fn.__name__, name): source for kernel, source in sources_of(*case)}
    return found


def sources_of(quantization, group_size, hidden, values, weight, scale, ids, is_grouped):
    spec = turnout.ExpertsSpec(quantization=quantization, group_size=group_size)
    slots = 64 if is_grouped else 16
    tile = quantized.TILES[slots]._replace(rows=32)  # a small one: it compiles faster
    scheme = (group_size, weight == torch.int32, values == torch.uint8)
    is_quantized = values != hidden
    map_pointers = ("*i32",) * 3 if is_grouped else (None,) * 3
    activation = (spec.activation, spec.activation_alpha, spec.activation_limit, spec.up_offset)
    columns = quantized.columns_at_a_time(HIDDEN, spec, tile)
    scale_pointer = "*fp32" if is_quantized else None
    yield source_of(
        quantized._quantized_gate_up_kernel,
        (POINTER[values], scale_pointer, POINTER[weight], POINTER[scale], POINTER[ids], *map_pointers, POINTER[hidden]),
        ("i32",),
        (HIDDEN, TOP_K, NUM_EXPERTS, HIDDEN, INTERMEDIATE, *scheme, *activation, slots, tile.rows // 2, columns),
    )
    columns = quantized.columns_at_a_time(INTERMEDIATE, spec, tile)
    tensors = (POINTER[values], scale_pointer, POINTER[weight], POINTER[scale], POINTER[ids], *map_pointers)
    yield source_of(
        quantized._quantized_down_kernel,
        (*tensors, POINTER[hidden]),
        ("i32",),
        (NUM_EXPERTS, HIDDEN, INTERMEDIATE, *scheme, slots, tile.rows, columns),
    )
    if is_quantized:
        stored = torch.int8 if values == torch.int8 else torch.uint8
        lowest, highest = limits(torch.int8 if values == torch.int8 else torch.float8_e4m3fn, 8)
        constants = (HIDDEN, HIDDEN, highest, highest - lowest, torch.finfo(hidden).eps, 512)
        yield source_of(quantized._quantize_kernel, (POINTER[hidden], POINTER[stored], "*fp32"), (), constants)


def source_of(kernel, pointers, numbers, constants):
    names = kernel.arg_names
    arguments = dict(zip(names, (*pointers, *numbers, *constants), strict=True))
    typed = len(pointers) + len(numbers)
    signature = {name: "constexpr" if i >= typed or arguments[name] is None else arguments[name]
                 for i, name in enumerate(names)}  # fmt: skip
    values = {(i,): arguments[name] for i, name in enumerate(names) if signature[name] == "constexpr"}
    return kernel, ASTSource(fn=kernel, signature=signature, constexprs=values)
