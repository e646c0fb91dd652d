"""Our own budget is zero, outside and inside the operators: `turnout.route`, and an applied tiny Gemma 4."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

import turnout
from turnout.audit import models
from turnout.audit.api import audit_calls
from turnout.audit.decoder import Steps
from turnout.audit.device_time import ModuleTime, measure

INSTALLED = any(point.value == "pytest_turnout" for point in entry_points(group="pytest11"))
pytest_plugins = () if INSTALLED else ("pytest_turnout",)

SPEC = turnout.RouterSpec(num_experts=16, top_k=4)
CONTRACTS = [
    turnout.Contract(ids_dtype=ids, weights_dtype=weights)
    for ids in (torch.int16, torch.int32, torch.int64)
    for weights in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: f"{c.ids_dtype}-{c.weights_dtype}")
class TestRoute:
    def test_no_copy_around_the_operator(self, copy_budget, contract, logits_dtype) -> None:
        logits = torch.randn(8, 16).to(logits_dtype)
        with copy_budget(0) as budget:
            turnout.route(logits, SPEC, contract)
        assert any("turnout::" in note for note in budget.report.notes)

    def test_no_copy_inside_the_operator(self, contract, logits_dtype) -> None:
        """The recorder does not see inside; the profiler does."""
        logits = torch.randn(8, 16).to(logits_dtype)
        turnout.route(logits, SPEC, contract)
        (phase,) = measure({"route": [lambda: turnout.route(logits, SPEC, contract)]}, None, "cpu").phases
        assert (phase.copy_calls, phase.to_copy_calls) == (0, 0), phase.modules


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_applied_routers_make_none_between_logits_and_stock_experts(copy_budget, experts) -> None:
    model = applied_tiny_gemma4(stock_experts=experts)
    steps = Steps(model, prefill=8, concurrency=2)
    with torch.no_grad(), copy_budget(0, model=model, region="routing"):
        steps.first()
        steps.next()


@pytest.mark.parametrize("region", ["routing", "experts"])
def test_the_applied_tiny_gemma4_makes_none_from_logits_to_layer_output(copy_budget, region) -> None:
    model = applied_tiny_gemma4()
    steps = Steps(model, prefill=8, concurrency=2)
    with torch.no_grad(), copy_budget(0, model=model, region=region) as budget:
        steps.first()
        steps.next()
    assert any("turnout::experts" in note for note in budget.report.notes)


@pytest.mark.parametrize("tokens", [1, 16], ids=["decode", "prefill"])
def test_none_inside_the_operators_of_an_applied_layer(tokens) -> None:
    """The recorder does not see inside; the profiler does. What comes before the logits is the model's own."""
    model = applied_tiny_gemma4()
    assert copies_in_a_layer(model, tokens) == []
    model.set_experts_implementation("grouped_mm")
    assert copies_in_a_layer(model, tokens) != []


def copies_in_a_layer(model: Any, tokens: int) -> list[ModuleTime]:
    """In the experts, and inside of operators that are not torch's."""
    layer = model.model.layers[0]
    hidden_states = torch.randn(tokens, 128, dtype=torch.bfloat16)

    def run() -> None:
        _, topk_weights, topk_ids = layer.router(hidden_states)
        layer.experts(hidden_states, topk_ids, topk_weights)

    with torch.no_grad():
        run()
        (phase,) = measure({"layer": [run]}, layer, "cpu").phases
    return [row for row in phase.modules if row.inside or row.module.endswith("experts")]


def applied_tiny_gemma4(stock_experts: str | None = None) -> Any:
    pytest.importorskip("transformers")
    model = models.load("tiny", dtype=torch.bfloat16, experts=stock_experts)
    turnout.apply(model, experts=stock_experts is None)
    return model


def test_the_budget_would_notice_the_copy_of_pr_40565(copy_budget) -> None:
    """int32 ids for a reader of int64: without the right contract there is a cast, and the budget sees it."""
    logits = torch.randn(8, 16)

    def with_contract(ids_dtype: torch.dtype) -> int:
        contract = turnout.Contract(ids_dtype=ids_dtype)
        report = audit_calls(lambda: logits.gather(1, turnout.route(logits, SPEC, contract).topk_ids.long()))
        return report.redundant_count()

    assert (with_contract(torch.int32), with_contract(torch.int64)) == (1, 0)
