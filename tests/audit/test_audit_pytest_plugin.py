"""The budget fails the test that exceeds it, names the offenders, and leaves other tests alone."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

pytest_plugins = ["pytester"]

# Installed, the plugin loads itself, and pytest refuses to load it under a second name.
INSTALLED = any(point.value == "pytest_turnout" for point in entry_points(group="pytest11"))
LOAD = () if INSTALLED else ("-p", "pytest_turnout")

PROGRAM = """
import pytest
import torch

def wasteful(x):
    return (x * 2).clone() + 1

def test_within(copy_budget):
    with copy_budget(1) as budget:
        wasteful(torch.ones(3))
    assert budget.report.redundant_count() == 1

def test_over(copy_budget):
    with copy_budget(0):
        wasteful(torch.ones(3))

@pytest.mark.copy_budget(0)
def test_marked():
    wasteful(torch.ones(3))

@pytest.mark.copy_budget(0)
def test_marked_and_clean():
    assert (torch.ones(3) * 2).sum() == 6

def test_in_a_region(copy_budget):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Identity())
    from turnout.audit.regions import Region
    with torch.no_grad(), copy_budget(0, model=model, region=Region("first", "0")):
        wasteful(model(torch.ones(2, 3)))

def test_in_a_region_that_does_not_run(copy_budget):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    from turnout.audit.regions import Region
    with torch.no_grad(), copy_budget(0, model=model, region=Region("typo", "1")):
        model(torch.ones(2, 3))

def test_in_inference_mode(copy_budget):
    with torch.inference_mode(), copy_budget(0):
        wasteful(torch.ones(3)).reshape(-1).contiguous()

def test_an_input_made_before_the_block(copy_budget):
    x = torch.ones(3).bfloat16()
    with copy_budget(0):
        x.float() + 1

def test_that_fails_by_itself(copy_budget):
    with copy_budget(0):
        raise RuntimeError("its own reason")
"""


@pytest.fixture
def result(pytester: pytest.Pytester) -> pytest.RunResult:
    pytester.makepyfile(PROGRAM)
    return pytester.runpytest_inprocess(*LOAD, "-p", "no:xdist", "-p", "no:cacheprovider")


def test_budget_as_fixture_and_marker(result: pytest.RunResult) -> None:
    result.assert_outcomes(passed=4, failed=5)
    result.stdout.fnmatch_lines(
        [
            "1 redundant copies, the budget allows 0:",
            "*1 x layout: aten.clone.default float32 -> float32 [[]3[]]*",
            "*.py:5 in wasteful*",
            "*Read the source.*",
        ]
    )
    result.stdout.fnmatch_lines(["*RuntimeError: its own reason*"])
    result.stdout.fnmatch_lines(["*ValueError: a budget would hold nothing: no operator ran in region 'typo'*"])
    result.stdout.fnmatch_lines(
        [
            "FAILED *::test_over*",
            "FAILED *::test_marked *",
            "FAILED *::test_in_inference_mode*",
            "FAILED *::test_that_fails*",
        ]
    )


def test_marker_is_documented(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess(*LOAD, "--markers")
    result.stdout.fnmatch_lines(["*copy_budget(limit*"])
