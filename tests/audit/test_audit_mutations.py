"""One copy planted in a real model, or taken out of it, changes the report by exactly that copy."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from mutate import (
    CAST,
    Mutator,
    PlantClone,
    PlantMismatch,
    PlantRepetition,
    PlantRoundTrip,
    RemoveCast,
    RemoveCopy,
    RemoveRepetition,
    fingerprint,
    fresh_outputs,
)

from turnout.audit import models
from turnout.audit.aliasing import copies_of
from turnout.audit.api import default_regions
from turnout.audit.build import build_report
from turnout.audit.graph import Graph
from turnout.audit.layout import same_layout
from turnout.audit.recorder import Recorder
from turnout.audit.rules import Classifier, CopyKind

pytest.importorskip("transformers")

BUILDERS = {"gemma4": models.small_gemma4, "mixtral": models.tiny_mixtral, "qwen3_moe": models.tiny_qwen3_moe}


@pytest.fixture(scope="module", params=BUILDERS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return BUILDERS[request.param](torch.bfloat16, num_hidden_layers=2)


@pytest.fixture(scope="module")
def stock(model: torch.nn.Module) -> tuple[Graph, Counter]:
    recorder, report = record(model)
    return recorder.graph, fingerprint(report)


def record(model: torch.nn.Module, mutator: Callable[[Recorder], Mutator] | None = None):
    recorder = Recorder(model)
    ids = torch.arange(12)[None] * 7 % 512
    with torch.no_grad(), recorder.call("call", [ids]) as kept:
        if mutator is None:
            kept.append(model(ids))
        else:
            with mutator(recorder) as planted:
                kept.append(model(ids))
            assert planted.done
    return recorder, build_report(recorder, "model", default_regions(model))


def changes(before: Counter, after: Counter) -> tuple[Counter, Counter]:
    """Copies that are only in the second report, and copies that are only in the first."""
    return after - before, before - after


def pick(places: list[int], count: int) -> list[int]:
    return random.Random(0).sample(places, count)


@pytest.mark.parametrize(
    ("plant", "count", "dtypes"),
    [
        (PlantClone, 11, (torch.bfloat16, torch.float32, torch.int64, torch.int32)),
        (PlantRoundTrip, 7, (torch.bfloat16, torch.int64)),
        (PlantMismatch, 3, (torch.int64,)),
    ],
)
def test_planting_a_copy_adds_exactly_that_copy(model, stock, plant, count, dtypes) -> None:
    graph, before = stock
    for place in pick(fresh_outputs(graph, *dtypes), count):
        _, report = record(model, lambda recorder, place=place: plant(recorder, place))
        added, gone = changes(before, fingerprint(report))
        assert not gone, (graph.ops[place], gone)
        assert Counter(kind for kind, *_ in added.elements()) == plant.kinds, (graph.ops[place], added)
        assert {module for _, _, module, *_ in added} == {graph.ops[place].module}


def test_planting_a_second_cast_adds_exactly_that_cast(model, stock) -> None:
    graph, before = stock
    casts = [i for i, copy in copies_of(graph).items() if copy.is_cast and graph.ops[i].packet == CAST]
    for place in pick(casts, 4):
        _, report = record(model, lambda recorder, place=place: PlantRepetition(recorder, place))
        added, gone = changes(before, fingerprint(report))
        assert not gone, (graph.ops[place], gone)
        assert Counter(kind for kind, *_ in added.elements()) == PlantRepetition.kinds, (graph.ops[place], added)


def test_removing_a_copy_takes_exactly_that_copy_away(model, stock) -> None:
    graph, before = stock
    places = removable(graph)
    for place in pick(sorted(places), 5):
        kind = places[place]
        _, report = record(model, lambda recorder, place=place, kind=kind: REMOVERS[kind](recorder, place))
        added, gone = changes(before, fingerprint(report))
        assert not added, (graph.ops[place], added)
        assert gone.total() == 1, (graph.ops[place], gone)
        assert next(iter(gone))[0] == kind.value


REMOVERS = {
    CopyKind.DTYPE_MISMATCH: RemoveCast,
    CopyKind.REPEATED: RemoveRepetition,
    CopyKind.LAYOUT: RemoveCopy,
}


def removable(graph: Graph) -> dict[int, CopyKind]:
    """Redundant copies that can go alone: a cast whose sisters read the same tensor cannot."""
    classifier = Classifier(graph)
    found = {}
    for index, copy in classifier.copies.items():
        kind = classifier.verdict(graph.ops[index]).kind
        readers = {access.op for access in graph.reads_of_value(copy.source)}
        alone = kind is not CopyKind.DTYPE_MISMATCH or len(readers) == 1
        still = kind is not CopyKind.LAYOUT or same_layout(copy.source, copy.target)
        if kind in REMOVERS and alone and still:
            found[index] = kind
    return found
