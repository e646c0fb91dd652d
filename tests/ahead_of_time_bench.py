"""The benchmarks' kernel, for ahead_of_time.py."""

from triton.compiler import ASTSource

from turnout.bench import triton as bench


def sources():
    """What Triton would compile to measure the rate at which a device reads."""
    kernel = bench._read_kernel
    constants = {"STEPS": 16, "BLOCK": bench.WORDS}
    signature = {"source_ptr": "*i32", "sums_ptr": "*i32"} | dict.fromkeys(constants, "constexpr")
    return {("_read_kernel", "16 steps"): ASTSource(fn=kernel, signature=signature, constexprs=constants)}
