"""How much turnout does in a vLLM process: the environment, vLLM's own configuration, and a switch at run time."""

from __future__ import annotations

import os
from typing import Any

MODES = ("off", "routing", "layer")
DEFAULT = "routing"

forced: str | None = None  # by `use`; goes before what each layer was configured with


def checked(mode: Any, source: str) -> str:
    """The mode, if it is one.

    Raises:
        ValueError: it is none; the message says where it comes from, and which there are.
    """
    if mode not in MODES:
        raise ValueError(f"{source} must be one of {', '.join(MODES)}; got {mode!r}")
    return str(mode)


def environment_mode() -> str:
    """The mode of ``TURNOUT`` in the environment.

    Raises:
        ValueError: it is none.
    """
    return checked(os.environ.get("TURNOUT") or DEFAULT, "TURNOUT in the environment")


def configured_mode(additional_config: Any) -> str:
    """The mode of a layer: vLLM's ``additional_config`` goes before the environment.

    Raises:
        ValueError: it is none.
    """
    if isinstance(additional_config, dict) and "turnout" in additional_config:
        return checked(additional_config["turnout"], "'turnout' in --additional-config")
    return environment_mode()


def force(mode: str | None) -> None:
    """Let all layers of the process run in this mode; None: each in its own."""
    global forced
    forced = None if mode is None else checked(mode, "mode")
