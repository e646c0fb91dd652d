"""The machine that turnout runs on: its devices, what can be profiled, and the facts that a record states."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from turnout._version import __version__

PACKAGES = ("torch", "triton", "transformers", "numba", "numpy")


def accelerator() -> torch.device | None:
    """The accelerator of this machine, if it has one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def find_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: it is not here, or no device at all.
    """
    here = accelerator()
    try:
        device = torch.device(name)
    except RuntimeError:  # torch's way of saying that it knows no such device type
        raise ValueError(f"{name!r} is no torch device; pass cpu, cuda or xpu") from None
    if device.type != "cpu" and (here is None or here.type != device.type):
        raise ValueError(
            f"device {name!r} was asked for, but torch {torch.__version__} sees "
            f"{'no accelerator' if here is None else here.type} here; pass --device cpu, or run where one is"
        )
    return device


def profiler_activities(device_type: str) -> list[ProfilerActivity]:
    """What torch.profiler must follow to see work on a device: the CPU, and the accelerator if it is one.

    Raises:
        ValueError: torch.profiler does not follow such a device.
    """
    if device_type == "cpu":
        return [ProfilerActivity.CPU]
    activity: ProfilerActivity | None = getattr(ProfilerActivity, device_type.upper(), None)
    if activity is None:
        names = ", ".join(name.lower() for name in ProfilerActivity.__members__)
        raise ValueError(f"torch.profiler measures no device type {device_type!r}; give one of: {names}")
    return [ProfilerActivity.CPU, activity]


def environment(device: str) -> dict[str, object]:
    """Facts that a recorded measurement needs to be read later.

    Args:
        device: torch's device type on which the measurement ran.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "turnout": __version__,
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
    }


def device_name(device: str) -> str:
    """The product name of an accelerator, or of the CPU."""
    if device == "cpu":
        return cpu_name()
    return str(torch.get_device_module(device).get_device_name())


def cpu_name() -> str:
    """The processor's model name, as the kernel gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout turnout runs from, with a ``+`` where files were changed since; None outside one.

    A copy of the files without their history can say its commit in the environment variable TURNOUT_COMMIT.
    """
    if named := os.environ.get("TURNOUT_COMMIT"):
        return named
    root = Path(__file__).parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        return None
    head = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if head is None else head + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None where it refuses, as in a checkout that belongs to another user."""
    run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None
