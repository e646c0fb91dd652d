"""One source for every vendor's GPU: no vendor's own features, and it compiles for all of them."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import turnout

PACKAGE = Path(turnout.__file__).parent
# Files in which a vendor may be named, and why.
ALLOWED = {
    "bench/timing.py": "measures by the replay of graphs, which torch offers for CUDA and ROCm alone",
    "bench/routing.py": "measures the kernel on NVIDIA's GPUs against the one that vLLM runs there",
}
TARGETS = {"sm80": "cubin", "sm90": "cubin", "sm100": "cubin", "gfx942": "hsaco"}
VENDOR_ATTRIBUTES = {"cuda", "xpu", "hip", "extra", "libdevice", "inline_asm_elementwise"}


def vendor_features(source):
    """Lines of a source that use what only one vendor has: its torch module, its language extras, its assembly."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) if name in VENDOR_ATTRIBUTES:
                yield f"{node.lineno}: {ast.unparse(node)}"
            case ast.Import() | ast.ImportFrom():
                words = set(re.split(r"[.\s,]+", ast.unparse(node)))
                if words & VENDOR_ATTRIBUTES:
                    yield f"{node.lineno}: {ast.unparse(node)}"
            case ast.keyword(arg="device", value=ast.Constant(value=str(name))) if name != "cpu" and name != "meta":
                yield f"{node.value.lineno}: device={name!r}"


def files():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if str(path.relative_to(PACKAGE)) not in ALLOWED]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_vendor_is_named(path):
    assert list(vendor_features(path.read_text())) == []


def test_exceptions_are_needed():
    for name in ALLOWED:
        assert list(vendor_features((PACKAGE / name).read_text())), f"{name} needs no exception any more"


@pytest.mark.parametrize(
    "source",
    [
        "torch.cuda.synchronize()",
        "from torch import cuda",
        "from torch.cuda import Stream",
        "logits = logits.cuda()",
        "torch.empty(3, device='cuda')",
        "tl.inline_asm_elementwise('add', '=r', [x], tl.int32, True, 1)",
        "from triton.language.extra import libdevice",
        "tl.extra.cuda.libdevice.exp(x)",
    ],
)
def test_a_planted_vendor_feature_is_found(source):
    assert list(vendor_features(source))


def test_what_every_vendor_has_is_not_found():
    lines = [
        "x.is_cuda or x.device.type == 'cuda'",
        "torch.accelerator.current_accelerator()",
        "zeros(1, device='cpu')",
    ]
    assert list(vendor_features("\n".join(lines))) == []


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every kernel compiled from scratch, in a process in which kernels are not interpreted."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = [sys.executable, str(Path(__file__).parent / "ahead_of_time.py")]
    run = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_ahead_of_time(target, compiled):
    ours = [result for result in compiled if result["target"] == target]
    assert {result["kernel"] for result in ours} == kernels_in_the_package()
    for result in ours:
        assert result["code"].get(TARGETS[target], 0) > 1000, result["case"]


def test_offsets_are_64_bit(compiled):
    """Row times stride passes 2^31 in a long prefill: every product that the kernels take is of 64 bits."""
    for result in compiled:
        products = re.findall(r"arith\.muli .* : (\S+)", result["ttir"])
        assert products, "rows are multiplied by their stride"
        assert all("i64" in kind for kind in products), (result["case"], products)


def kernels_in_the_package():
    """Names of the entry points (functions of a launch, not helpers that they call) under ``@triton.jit``."""
    return {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
