"""What importing turnout brings along: nothing that is heavy, optional, or touches a driver."""

import pkgutil
import subprocess
import sys
import textwrap

import pytest

import turnout

HEAVY = ("triton", "transformers", "numba", "matplotlib", "vllm")
# The modules that are there to use one of them, or are entered by a program that has imported it.
MAY_IMPORT = {
    "triton": (
        "turnout.device.",
        "turnout.router.triton",
        "turnout.routing.triton",
        "turnout.permutation.triton",
        "turnout.remap.triton",
        "turnout.combine.triton",
        "turnout.experts.triton",
        "turnout.experts._triton_quantized",
        "turnout.experts.grouped",
        "turnout.experts._grouped",
        "turnout.integrations._transformers_",  # transformers imports it
        "turnout.bench.triton",
    ),
    "transformers": ("turnout.integrations._transformers_",),
    "numba": tuple(f"turnout.{room}._cpu" for room in ("routing", "permutation", "experts", "combine", "remap")),
}


def run(script, *arguments):
    """Output of a script in a fresh process; fails with the script's own message."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_turnout_imports_nothing_heavy():
    assert run(f"import sys, turnout; print(*(set({HEAVY}) & set(sys.modules)))") == []


def test_importing_turnout_touches_no_driver():
    script = """
        import torch, turnout
        for kind in ("cuda", "xpu"):
            print(getattr(torch, kind).is_initialized())
    """
    assert run(script) == ["False", "False"]


@pytest.mark.parametrize("package", HEAVY)
def test_no_module_imports_it_but_those_made_for_it(package):
    modules = [module.name for module in pkgutil.walk_packages(turnout.__path__, "turnout.")]
    light = [name for name in modules if not name.startswith(MAY_IMPORT.get(package, ())) and "__main__" not in name]
    assert len(light) > 15
    script = """
        import importlib, sys
        package, *modules = sys.argv[1:]
        for name in modules:
            importlib.import_module(name)
            if package in sys.modules:
                sys.exit(f"{name} imports {package}")
    """
    run(script, package, *light)


def test_without_triton_the_other_implementations_work():
    script = """
        import sys
        sys.modules["triton"] = None  # as if not installed
        import torch, turnout
        spec, contract = turnout.RouterSpec(num_experts=16, top_k=2), turnout.Contract()
        logits = torch.arange(32.0).view(2, 16)
        for impl in ("auto", "cpu", "reference"):
            assert turnout.route(logits, spec, contract, impl=impl).topk_ids.tolist() == [[15, 14]] * 2
        try:
            turnout.route(logits, spec, contract, impl="triton")
        except ImportError as error:
            print(error)
    """
    assert " ".join(run(script)) == "impl='triton' needs the triton package: pip install 'turnout[triton]'"


def test_public_names():
    """Names promised to users; each has a docstring."""
    for name in turnout.__all__:
        assert hasattr(turnout, name)
    for name in ("RouterSpec", "Contract", "RoutingInputs", "Routing", "CatalogueEntry", "route", "contracts"):
        assert name in turnout.__all__
        assert getattr(turnout, name).__doc__
