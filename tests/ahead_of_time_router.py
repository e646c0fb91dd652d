"""The router's kernel, for ahead_of_time.py."""

from triton.compiler import ASTSource

from turnout.router import triton as router

CASES = {  # pointers to hidden states, weights, bias, scale and logits
    "gemma4": ("*bf16", "*bf16", "constexpr", "*bf16", "*bf16"),
    "biased": ("*fp16", "*fp16", "*fp16", "constexpr", "*fp32"),
    "plain": ("*fp32", "*fp32", "constexpr", "constexpr", "*fp32"),
}


def sources():
    """What Triton would compile for routers with and without norm and bias."""
    return {("_project_kernel", name): source(kinds) for name, kinds in CASES.items()}


def source(pointers):
    kernel = router._project_kernel
    constants = (0, 2816, 128, 1e-6, 2816**-0.5, 4096)
    kinds = (*pointers, *["constexpr"] * len(constants))
    values = (*[None] * len(pointers), *constants)
    constexprs = {(i,): value for i, (kind, value) in enumerate(zip(kinds, values, strict=True)) if kind == "constexpr"}
    return ASTSource(fn=kernel, signature=dict(zip(kernel.arg_names, kinds, strict=True)), constexprs=constexprs)
