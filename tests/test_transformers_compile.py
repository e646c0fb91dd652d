"""An applied model compiles as one graph, and exports."""

import collections

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("transformers", reason="transformers is not installed")
from gemma4_models import drawn_gemma4, logits_of

from turnout.integrations.transformers import apply, restore


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("batched_mm", torch.float32), ("grouped_mm", torch.bfloat16)],
)
def test_a_compiled_model_stays_one_graph_and_follows_apply_and_restore(implementation, dtype):
    model = drawn_gemma4(dtype, implementation)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.randint(8, 56, (2, 12))
    stock = logits_of(compiled, ids)
    apply(model)
    assert torch.equal(logits_of(compiled, ids), logits_of(model, ids))
    assert calls_of_turnout(lambda: logits_of(compiled, ids)) == {"turnout::route": 2, "turnout::experts": 2}
    restore(model)
    assert torch.equal(logits_of(compiled, ids), stock)
    assert calls_of_turnout(lambda: logits_of(compiled, ids)) == {}


def calls_of_turnout(function):
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        function()
    return collections.Counter(event.name for event in trace.events() if event.name.startswith("turnout::"))


def test_a_compiled_model_records_router_probabilities():
    model = drawn_gemma4()
    apply(model)
    ids = torch.randint(8, 56, (2, 12))
    compiled = torch.compile(model.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        # Recorders are installed by an eager call: their lock does not compile, in a stock model neither.
        eager_record = model.model(ids, output_router_logits=True).router_logits
        compiled_record = compiled(ids, output_router_logits=True).router_logits
    assert len(compiled_record) == len(eager_record) == 2
    assert all(map(torch.equal, compiled_record, eager_record))


def test_inductor_compiles_an_applied_model_as_one_graph():
    model = drawn_gemma4()
    apply(model)
    ids = torch.randint(8, 56, (2, 12))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, ids), logits_of(model, ids), rtol=0, atol=1e-4)


def test_an_applied_model_exports_with_both_operators():
    model = drawn_gemma4()
    apply(model)
    ids = torch.randint(8, 56, (2, 12))
    with torch.no_grad():
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    targets = collections.Counter(str(node.target) for node in program.graph.nodes)
    assert (targets["turnout.route.default"], targets["turnout.experts.default"]) == (2, 2)
    exported = program.module()(ids, use_cache=False).logits
    torch.testing.assert_close(exported, logits_of(model, ids), rtol=0, atol=1e-5)
