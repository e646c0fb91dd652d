"""Regions, strides, dtypes: the small questions that the rules ask."""

from __future__ import annotations

import itertools

import pytest
import torch
from gallery import BF16, F32, pr_40565
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from turnout.audit import dtypes
from turnout.audit.api import audit_calls
from turnout.audit.graph import View
from turnout.audit.layout import overlap
from turnout.audit.regions import Region, moe_regions


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 4, bias=False, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    def forward(self, x):
        logits = self.proj(x.float().bfloat16())
        weights, ids = logits.float().softmax(-1).topk(2)
        return weights * self.scale.float()[ids], ids


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.bfloat16))

    def forward(self, x, weights, ids):
        return (x @ self.weight).float() * weights.sum() * ids.int().sum()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.between = Router(), Experts(), nn.Identity()

    def forward(self, x):
        weights, ids = self.router(x)
        unrelated = (x + 1).clone() + 1
        return self.experts(unrelated, weights, ids)


class TestRegions:
    def findings(self, region: Region):
        with torch.no_grad():
            report = audit_calls(nn.Sequential(Layer()), BF16, regions=[region])
        assert not report.error
        return [(f.kind.value, f.module) for f in report.select(region=region.name)]

    def test_from_logits_to_experts_holds_what_depends_on_the_logits_and_what_feeds_it(self) -> None:
        """Not the cast before the projection, nor the clone that merely runs in between."""
        assert self.findings(Region("routing", "*.router@gemm", "*.experts")) == [
            ("dtype mismatch", "0.router"),
            ("repeated", "0.router"),
        ]

    def test_a_region_that_matches_nothing_is_noted_and_holds_no_budget(self) -> None:
        with torch.no_grad():
            report = audit_calls(
                nn.Sequential(Layer()), BF16, regions=[Region("typo", "*.exprets"), Region("router", "*.router")]
            )
        assert report.region_operators["typo"] == 0 < report.region_operators["router"]
        assert [note for note in report.notes if "region" in note] == [
            "no operator ran in region 'typo' (*.exprets); operators ran in: *.router, *.router.proj, *, *.experts."
        ]
        assert report.over_budget(100, "router") < 0
        with pytest.raises(ValueError, match=r"would hold nothing: no operator ran in region 'typo'.*\*\.router"):
            report.over_budget(100, "typo")
        with pytest.raises(ValueError, match="no region 'other' to hold a budget; there are: typo, router"):
            report.over_budget(100, "other")

    def test_up_to_a_matrix_product_it_reaches_into_the_module(self) -> None:
        found = self.findings(Region("to gemm", "*.router@gemm", "*.experts@gemm"))
        assert ("dtype mismatch", "0.router") in found
        assert all(module == "0.router" for _, module in found)

    def test_a_module_alone(self) -> None:
        assert {module for _, module in self.findings(Region("experts", "*.experts"))} == {"0.experts"}

    def test_a_model_with_a_router_beside_its_experts_has_regions(self) -> None:
        assert moe_regions(nn.Sequential(Layer())) == (
            Region("routing", "*.router@gemm", "*.experts"),
            Region("experts", "*.experts"),
        )
        assert moe_regions(nn.Linear(2, 2)) == ()

    @pytest.mark.parametrize("text", ["routing", "=x", "a=", "a=b.."])
    def test_a_malformed_region_is_refused(self, text) -> None:
        with pytest.raises(ValueError, match="must be NAME=START or NAME=START"):
            Region.parse(text)

    def test_a_malformed_point_is_refused(self) -> None:
        with pytest.raises(ValueError, match="or one followed by @gemm"):
            audit_calls(pr_40565, F32, regions=[Region("bad", "*@gem", "*")])


def view(shape, stride, offset, dtype=torch.float32) -> View:
    return View(0, 0, 0, dtype, "cpu", tuple(shape), tuple(stride), offset)


views = st.builds(
    lambda dims, offset: view([n for n, _ in dims], [s for _, s in dims], offset),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 7)), max_size=3),
    st.integers(0, 20),
)


@given(views, views)
def test_overlap_is_what_the_elements_say(a: View, b: View) -> None:
    def elements(v: View) -> set[int]:
        steps = [range(0, n * s, s) if s else [0] for n, s in zip(v.shape, v.stride, strict=True)]
        return {v.offset + sum(path) for path in itertools.product(*steps)}

    assert overlap(a, b) == bool(elements(a) & elements(b))


def test_values_survive_where_the_table_says_so() -> None:
    """Every pair of dtypes, tried on the values at the ends of the narrower one."""
    floats = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    for source, target in itertools.product(floats + integers, floats + integers):
        if source.is_floating_point and not target.is_floating_point:
            assert not dtypes.keeps_every_value(source, target)
            continue
        info = torch.finfo(source) if source.is_floating_point else torch.iinfo(source)
        ends = [info.min, info.max, info.max // 2 + 1 if source in integers else 1 + info.eps]
        if source in floats:
            ends.append(info.smallest_normal * info.eps)
        values = torch.tensor(ends, dtype=source)
        survived = bool((values.to(target).to(source) == values).all()) and not (
            target in floats and bool(values.to(target).isinf().any())
        )
        if source in integers and target in floats:  # int64's end rounds up to 2^63 and wraps back to itself
            survived = info.max <= dtypes.largest_exact_integer(target)
        elif source in integers:
            survived = torch.iinfo(target).min <= info.min and info.max <= torch.iinfo(target).max
        assert dtypes.keeps_every_value(source, target) == survived, (source, target)
