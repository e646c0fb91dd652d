"""Operators are called past torch's dispatcher, unless something looks on that would not see them then."""

import pytest
import torch
import torch.utils._python_dispatch
from torch.fx.experimental.proxy_tensor import make_fx

import turnout
from turnout import operators
from turnout.operators import are_plain, operator, something_looks_on
from turnout.routing import ops

SPEC, CONTRACT = turnout.RouterSpec(num_experts=8, top_k=2), turnout.Contract()
LOGITS = torch.randn(3, 8)


def route(logits=LOGITS):
    return turnout.route(logits, SPEC, CONTRACT)


class Wrapped(torch.Tensor):
    """A tensor whose own data are of no meaning."""

    seen = ()

    @staticmethod
    def __new__(cls, inner):
        wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments, keywords=None):
        cls.seen = (*cls.seen, str(operator))
        return operator(*[each.inner if isinstance(each, cls) else each for each in arguments], **(keywords or {}))


class Sees:
    """What a mode is shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, function, types, arguments=(), keywords=None):
        self.seen.append(str(function))
        return function(*arguments, **(keywords or {}))


class SeesOperators(Sees, torch.utils._python_dispatch.TorchDispatchMode):
    __torch_dispatch__ = Sees.call


class SeesFunctions(Sees, torch.overrides.TorchFunctionMode):
    __torch_function__ = Sees.call


@pytest.fixture(scope="module")
def declared_here():
    """An operator that notes the strings it is handed: the dispatcher hands on copies."""
    handed = []

    @operator("turnout::test_notes(Tensor tensor, str word) -> Tensor", lambda tensor, word: tensor.clone())
    def notes(tensor, word):
        handed.append(word)
        return tensor.clone()

    return notes, handed


def passes_the_dispatcher(declared_here, tensor):
    notes, handed = declared_here
    word = "".join(["not", " interned"])
    notes(tensor, word)
    return handed[-1] is not word


def test_plain_calls_do_not_go_through_the_dispatcher(declared_here):
    assert not something_looks_on()
    assert not passes_the_dispatcher(declared_here, torch.ones(2))
    assert not passes_the_dispatcher(declared_here, torch.nn.Parameter(torch.ones(2), requires_grad=False))


def test_all_do_with_a_torch_that_cannot_say_who_looks_on(declared_here, monkeypatch):
    monkeypatch.setattr(operators, "_CAN_SEE", False)
    assert passes_the_dispatcher(declared_here, torch.ones(2))


def test_profiled_calls_do(declared_here):
    with torch.profiler.profile() as profile:
        assert passes_the_dispatcher(declared_here, torch.ones(2))
        route()
    assert {"turnout::test_notes", "turnout::route"} <= {event.key for event in profile.key_averages()}
    assert not passes_the_dispatcher(declared_here, torch.ones(2))


@pytest.mark.parametrize("mode", [SeesOperators, SeesFunctions])
def test_modes_see_operators(mode):
    with mode() as looking:
        route()
    assert looking.seen.count("turnout.route.default") == 1


def test_subclasses_of_tensors_see_operators():
    result = ops.route(Wrapped(LOGITS), ops.declarations(SPEC, CONTRACT), "cpu")
    assert Wrapped.seen == ("turnout.route.default",)
    assert torch.equal(result[1], route().topk_ids)


def test_a_subclass_among_the_structures_is_seen():
    """In a tuple, as experts take them."""
    assert are_plain((LOGITS, None, "cpu", 1, (LOGITS, None)))
    assert not are_plain((LOGITS, (None, Wrapped(LOGITS))))


def test_tracers_see_operators():
    graph = make_fx(lambda logits: tuple(route(logits)[:2]))(LOGITS).graph
    assert torch.ops.turnout.route.default in {node.target for node in graph.nodes}
    traced = torch.jit.trace(lambda logits: tuple(route(logits)[:2]), LOGITS, check_trace=False)
    other = torch.randn(3, 8)
    assert torch.equal(traced(other)[1], route(other).topk_ids)


def test_vmap_computes_each_batch_by_itself():
    batches = torch.randn(2, 3, 8)
    ids = torch.vmap(lambda logits: route(logits).topk_ids)(batches)
    assert torch.equal(ids, torch.stack([route(logits).topk_ids for logits in batches]))


def test_operators_that_write_always_go_through_it():
    """It notes there what was written to, as far as this version of torch does."""
    handed = []

    @operator("turnout::test_writes(Tensor(a!) tensor, str word) -> ()", lambda tensor, word: None)
    def writes(tensor, word):
        handed.append(word)

    word = "".join(["not", " interned"])
    writes(torch.ones(2), word)
    assert handed == [word]
    assert handed[0] is not word
