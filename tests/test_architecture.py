"""The layout of the project: imports go downwards, implementations stay apart, files stay short."""

import ast
import re
from pathlib import Path

import pytest

import turnout

PACKAGE = Path(turnout.__file__).parent
PROJECT = PACKAGE.parent
ROOMS = ("router", "routing", "permutation", "experts", "combine", "remap")
# Implementations by kind: one that spans stations builds on its own kind in the stations before and after.
KINDS = {"reference": "reference", "cpu": "cpu", "triton": "triton", "grouped": "triton"}

# From the bottom up: a module imports from its own layer and those below. "" is the package itself: what
# lies above it uses turnout as its users do.
LAYERS = [
    {"_version", "device", "machine"},
    {
        "families",
        "experts_families",
        "spec",
        "types",
        "contracts",
        "catalogue",
        "catalogue_own",
        "catalogue_vllm",
        "impls",
        "operators",
        "threads",
    },
    {*ROOMS, "testing"},
    {"moe"},
    {"integrations"},
    {""},
    {"audit", "bench"},
    {"cli", "__main__"},
]
FILE_LINES, FUNCTION_LINES, KERNEL_LINES, ARGUMENTS = 400, 60, 120, 8


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = [
    path
    for folder in ("turnout", "tests", "scripts", "benchmarks")
    for path in sorted((PROJECT / folder).rglob("*.py"))
]
EACH_MODULE = pytest.mark.parametrize("module", MODULES, ids=lambda module: module or "turnout")
EACH_SOURCE = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PROJECT)))


def imports_of(module):
    """Modules of the package that a module imports, at its top or later, without the leading ``turnout.``.

    Imports for the type checker alone do not count: nothing runs them.
    """
    found = set()
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("turnout.") in MODULES else node.module for name in inside}
    return {name.removeprefix("turnout").removeprefix(".") for name in found if name.split(".")[0] == "turnout"}


def layer_of(module):
    top = module.split(".")[0]
    layers = [height for height, names in enumerate(LAYERS) if top in names]
    assert layers, f"{top} has no place in LAYERS"
    return layers[0]


@EACH_MODULE
def test_imports_go_downwards(module):
    upwards = {name for name in imports_of(module) if layer_of(name) > layer_of(module)}
    if module == "contracts":
        assert imports_of(module) == {"catalogue"}, "the catalogue is read at its first use"
    assert upwards == set()


@pytest.mark.parametrize("room", [room for room in ROOMS if (PACKAGE / room).is_dir()])
def test_implementations_import_no_other_kind(room):
    """What kinds share lies in ``device``; a part of one carries its name: ``_cpu_kernel`` of ``cpu``."""
    kinds = {module: kind_of(module) for module in MODULES if module.startswith(f"{room}.") and kind_of(module)}
    assert set(kinds.values()) >= {"reference"}
    for module, kind in kinds.items():
        others = {name for name in imports_of(module) if kind_of(name) not in (None, kind)}
        assert others == set(), module


def kind_of(module):
    """``"cpu"`` for ``routing.cpu`` and ``routing._cpu_kernel``; None for what is no implementation."""
    room, _, name = module.partition(".")
    names = [impl for impl in KINDS if re.fullmatch(rf"{impl}|_{impl}_\w+", name)]
    return KINDS[names[0]] if room in ROOMS and names else None


@pytest.mark.parametrize("room", [room for room in ROOMS if (PACKAGE / room).is_dir()])
def test_a_room_has_an_interface_and_a_reference(room):
    assert {f"{room}.api", f"{room}.reference"} <= set(MODULES)


@EACH_SOURCE
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= FILE_LINES
    for function in functions_of(source):
        lines = function.end_lineno - function.lineno + 1
        limit = KERNEL_LINES if is_kernel(function) else FUNCTION_LINES
        assert lines <= limit, f"{function.name} has {lines} lines"


@EACH_SOURCE
def test_functions_take_few_arguments(path):
    """Kernels take flat arguments by nature, and a command's arguments are the options of its command line."""
    for function in functions_of(path.read_text()):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        is_command = path.name == "cli.py" and function.name.endswith("_command")
        if not is_kernel(function) and not is_command:
            assert len([a for a in arguments if a.arg not in ("self", "cls")]) <= ARGUMENTS, function.name


def functions_of(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def is_kernel(function):
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@EACH_MODULE
def test_no_exception_is_swallowed(module):
    """Who catches everything, to note it, raises it again: nothing falls back in silence."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = {"BaseException"} if node.type is None else set(re.findall(r"\w+", ast.unparse(node.type)))
            if caught & {"Exception", "BaseException"}:
                assert ast.unparse(node.body[-1]) == "raise", f"line {node.lineno} catches {caught}"
