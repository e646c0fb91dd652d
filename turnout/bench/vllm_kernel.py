"""The Gemma 4 routing kernel of an installed vLLM, read from its source without importing vLLM."""

from __future__ import annotations

import ast
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FILE = "model_executor/models/gemma4.py"
_NAMES = ("_gemma4_routing_kernel", "gemma4_fused_routing_kernel_triton")


def find_source(folder: Path | None = None) -> Path:
    """The file that holds the kernel: in ``folder`` (a copy of the package ``vllm``), or in the installed one.

    Raises:
        FileNotFoundError: neither is there.
    """
    if folder is None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or spec.submodule_search_locations is None:
            raise FileNotFoundError("vLLM is not installed; install it, or name a copy of its package folder")
        folder = Path(spec.submodule_search_locations[0])
    source = folder / _FILE
    if not source.exists():
        raise FileNotFoundError(f"{folder} holds no {_FILE}; name the folder of the package vllm")
    return source


def load_gemma4_routing(source: Path) -> tuple[Any, Callable[..., Any]]:
    """The Triton kernel and its Python launcher, compiled from their text in vLLM's source."""
    text = source.read_text()
    functions = {
        node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name in _NAMES
    }
    missing = set(_NAMES) - set(functions)
    if missing:
        raise ValueError(f"{source} defines no {' or '.join(sorted(missing))}: another version of vLLM is needed")
    # Triton reads a kernel's source from its file, so the two functions get one.
    path = Path(tempfile.mkdtemp(prefix="turnout-bench-")) / "vllm_gemma4_routing.py"
    imports = "import torch\nimport triton\nimport triton.language as tl\n"
    path.write_text("\n\n".join([imports, *(ast.unparse(functions[name]) for name in _NAMES)]))
    spec = importlib.util.spec_from_file_location("vllm_gemma4_routing", path)
    assert spec, "a path to a .py file has a spec"
    assert spec.loader, "and a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module._gemma4_routing_kernel, module.gemma4_fused_routing_kernel_triton
