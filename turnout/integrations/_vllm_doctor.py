"""What the plugin would do in the vLLM installed here, said without a model or a server."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from turnout.contracts import contracts, dtype_name
from turnout.integrations import _vllm_modes as modes
from turnout.integrations import _vllm_runner as runner
from turnout.integrations._vllm_consumers import DISPATCHERS, EXPERTS
from turnout.integrations._vllm_routers import KNOWN_FUNCTIONS, KNOWN_ROUTERS, ROUTERS

GROUP = "vllm.general_plugins"
ENTRY_POINT = "turnout.integrations.vllm:register"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PluginDiagnosis:
    """The plugin in the vLLM of this environment.

    Attributes:
        found: what was looked at, and what was found.
        problems: why the plugin would not work, and what to do; empty if it would.
    """

    found: dict[str, str]
    problems: tuple[str, ...]


def examine_plugin() -> PluginDiagnosis | None:
    """Look at the vLLM installed; None if there is none. Importing vLLM takes seconds."""
    if importlib.util.find_spec("vllm") is None:
        return None
    problems: list[str] = []
    found = {"vLLM": importlib.import_module("vllm").__version__, "entry point": _entry_point(problems)}
    found["mode"] = _mode(problems)
    signatures = runner.signatures()
    unknown = [str(signature) for signature in signatures if not signature.is_known]
    problems += [f"this version of vLLM is not known: {each}" for each in unknown]
    found["functions of vLLM"] = f"{len(signatures) - len(unknown)} of {len(signatures)} are as the plugin knows them"
    if not unknown and (other := runner.occupant()) is not None:
        kind = f"{other.__module__}.{other.__qualname__}"
        problems.append(f"vLLM's MoE runner is replaced by {kind}, whose layers turnout leaves alone")
    if not unknown:
        present = sorted(_router_classes())
        found["routers computed by turnout"] = ", ".join(name for name in present if name in KNOWN_ROUTERS)
        found["routers that stay vLLM's"] = ", ".join(name for name in present if name not in KNOWN_ROUTERS) or "-"
    found["custom functions computed by turnout"] = ", ".join(KNOWN_FUNCTIONS)
    found["dispatchers, which declare ids"] = "\n".join(_readers(DISPATCHERS))
    found["experts, where none declares"] = "\n".join(_readers(EXPERTS))
    return PluginDiagnosis(found=found, problems=tuple(problems))


def _entry_point(problems: list[str]) -> str:
    if not any(entry.value == ENTRY_POINT for entry in importlib.metadata.entry_points(group=GROUP)):
        problems.append("vLLM does not find the plugin: install turnout into this environment (pip install turnout)")
        return "not found"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "turnout" not in allowed.split(","):
        problems.append(f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading the plugin: add turnout to it, or unset it")
        return f"found, but not in VLLM_PLUGINS={allowed!r}"
    return f"found: {ENTRY_POINT}"


def _mode(problems: list[str]) -> str:
    try:
        mode = modes.environment_mode()
    except ValueError as error:
        problems.append(str(error))
        return "none"
    return f"{mode} ({'TURNOUT in the environment' if os.environ.get('TURNOUT') else 'the default'})"


def _router_classes() -> Iterator[str]:
    importlib.import_module(ROUTERS + "router_factory")  # imports them all
    kinds: list[Any] = [importlib.import_module(ROUTERS + "base_router").BaseRouter]
    while kinds:
        subclasses = kinds.pop().__subclasses__()
        yield from (kind.__name__ for kind in subclasses)
        kinds += subclasses


def _readers(table: dict[str, str]) -> Iterator[str]:
    for name in dict.fromkeys(table.values()):
        kinds = ", ".join(kind for kind, entry in table.items() if entry == name)
        yield f"{name}, {dtype_name(contracts[name].ids_dtype)}: {kinds}"
