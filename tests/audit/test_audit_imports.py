"""Looking for the audit costs nothing: what is heavy is imported where it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["turnout.audit", "pytest_turnout", "turnout.audit.cli"])
def test_importing_it_imports_nothing_heavy_of_its_own(module: str) -> None:
    """Beyond what `import turnout` brings: no profiler run, no rich table, no transformers, no drawing."""
    code = (
        f"import sys, turnout; before = set(sys.modules); import {module}; new = set(sys.modules) - before;"
        "bad = [m for m in new if m.split('.')[0] in ('transformers', 'triton', 'numba', 'matplotlib', 'torch')];"
        "bad += [m for m in new if m.startswith('turnout.audit.') and m.split('.')[-1] in ('html', 'svg', 'recorder')];"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_package_itself_can_be_called() -> None:
    """`turnout.audit(fn)` is the documented spelling, whatever was imported before."""
    import torch

    import turnout.audit

    assert turnout.audit(lambda x: (x * 2).clone() + 1, torch.ones(2)).redundant_count() == 1


def test_pytest_starts_without_torch() -> None:
    """The plugin is loaded by every pytest of the environment, also of projects that know nothing of turnout."""
    subprocess.run([sys.executable, "-c", "import sys, pytest_turnout; assert 'torch' not in sys.modules"], check=True)
