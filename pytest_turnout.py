"""A budget of redundant copies for a test: the `copy_budget` fixture and the marker of the same name.

    def test_routing_makes_no_copy(copy_budget):
        inputs = prepare()
        with copy_budget(0):
            route(*inputs)

    @pytest.mark.copy_budget(2, model=model)     # the whole test body
    def test_forward(): ...

Nothing of PyTorch is imported before a budget is used.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from turnout.audit.regions import Region
    from turnout.audit.report import AuditReport, Finding

_MARKER = "copy_budget(limit, *, model=None, region=None): fail the test if it makes more redundant copies than limit"


class Budget:
    """What `copy_budget` gives to its block; `report` is there when the block has ended."""

    report: AuditReport


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def copy_budget() -> Callable[..., AbstractContextManager[Budget]]:
    """A context manager ``copy_budget(limit, *, model=None, region=None)`` that fails the test over its limit."""
    return _budget


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Put a marked test's body under its budget."""
    marker = item.get_closest_marker("copy_budget")
    if marker is None:
        return (yield)
    with _budget(*marker.args, **marker.kwargs):
        return (yield)


@contextmanager
def _budget(
    limit: int, *, model: torch.nn.Module | None = None, region: Region | str | None = None
) -> Iterator[Budget]:
    """Record the block and fail if it makes too many redundant copies.

    Args:
        limit: how many are allowed.
        model: the module whose names the failure message uses.
        region: count only this region's copies: a `Region`, or the name of one that `model` has by default.

    Raises:
        ValueError: `model` has no such region, or the block ran no operator in it.
    """
    from turnout.audit.api import default_regions
    from turnout.audit.build import build_report
    from turnout.audit.recorder import Recorder
    from turnout.audit.regions import Region

    budget, recorder = Budget(), Recorder(model)
    with recorder.call("test"):
        yield budget
    regions = (region,) if isinstance(region, Region) else default_regions(model)
    budget.report = build_report(recorder, "the test", regions)
    name = region.name if isinstance(region, Region) else region
    if budget.report.over_budget(limit, name) > 0:
        pytest.fail(_message(budget.report.redundant_count(name), limit, budget.report.redundant(name)), pytrace=False)


def _message(count: int, limit: int, offenders: tuple[Finding, ...]) -> str:
    lines = [f"{count} redundant copies, the budget allows {limit}:"]
    for f in offenders:
        lines.append(f"  {f.count} x {f.kind.value}: {f.op} {f.from_dtype} -> {f.to_dtype} {list(f.shape)}")
        lines.append(f"      {f.source}" + (f" (module {f.module})" if f.module else ""))
        lines.append(f"      {f.evidence}")
        lines.append(f"      {f.remedy}")
    return "\n".join(lines)
