"""The operators under torch's tools: opcheck, the compiler, export, fake tensors, the profiler inside."""

import dataclasses
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import turnout
from turnout.contracts import STRUCTURES
from turnout.permutation import ops
from turnout.routing.ops import declarations
from turnout.testing.inputs import make_logits
from turnout.testing.permutation import make_ids

SPEC = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
CONTRACT = turnout.Contract(structures=STRUCTURES, block_size=16, sentinel=-1, structures_dtype=torch.int64)
# All that a call may ask of torch: buffers for its results, and for counts between two launches.
ALLOWED = {"turnout::permute", "turnout::route_permuted", "aten::empty_strided", "aten::empty"}


def assert_same(one, other):
    for name, a, b in zip(one._fields, one, other, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_opcheck(num_tokens, impl, device):
    ids, logits = (
        make_ids("uniform", num_tokens, 16, 4, device=device),
        make_logits("normal", num_tokens, 16, device=device),
    )
    weights = torch.ones(num_tokens, 4, device=device)
    torch.library.opcheck(torch.ops.turnout.permute.default, (ids, weights, 16, CONTRACT.key, impl))
    arguments = (logits, declarations(SPEC, CONTRACT), impl, None, None, None, None)
    torch.library.opcheck(torch.ops.turnout.route_permuted.default, arguments)


def test_cold_fullgraph_compile_with_any_number_of_tokens(impl, device):
    """One graph without a break serves every T, with fewer slots than experts and with more."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def layer(logits):
        routing = turnout.route(logits * 2, SPEC, CONTRACT, impl=impl)
        permutation = turnout.permute(routing.topk_ids, 16, CONTRACT, topk_weights=routing.topk_weights, impl=impl)
        return routing, permutation

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (2, 3, 9):
        logits = make_logits("normal", num_tokens, 16, device=device)
        routing, permutation = compiled(logits)
        assert_same(routing, layer(logits)[0])
        assert_same(permutation, routing.permutation)
    assert counter.frame_count == 1


def test_cold_compile_by_inductor_in_a_fresh_process(kernel_device):
    """The default backend, the implementation that ``auto`` chooses, nothing imported or called before."""
    script = f"""
        import torch, turnout
        spec = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
        contract = turnout.Contract(structures=("permuted_idx", "sorted_token_ids"), block_size=4)
        logits = torch.arange(48.0, device="{kernel_device}").view(3, 16).sin()
        compiled = torch.compile(lambda x: turnout.route(x, spec, contract), fullgraph=True)(logits)
        for a, b in zip(compiled, turnout.route(logits, spec, contract)):
            assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b)), (a, b)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_export_carries_the_contract(tmp_path):
    """Without the bitmatrix: torch 2.11 writes no uint32 into the file of an exported program."""
    contract = dataclasses.replace(
        CONTRACT, structures=tuple(name for name in CONTRACT.structures if name != "bitmatrix")
    )

    class Layer(torch.nn.Module):
        def forward(self, logits):
            routing = turnout.route(logits, SPEC, contract, impl="cpu")
            return routing.topk_ids, routing.sorted_token_ids

    logits = make_logits("quantised", 6, 16)
    dynamic = {"logits": {0: torch.export.Dim("num_tokens", min=1, max=64)}}
    torch.export.save(torch.export.export(Layer(), (logits,), dynamic_shapes=dynamic), tmp_path / "layer.pt2")
    run = torch.export.load(tmp_path / "layer.pt2").module()
    for batch in (logits, logits[:3]):
        want = turnout.route(batch, SPEC, contract, impl="cpu")
        topk_ids, sorted_token_ids = run(batch)
        assert torch.equal(topk_ids, want.topk_ids)
        assert torch.equal(sorted_token_ids, want.sorted_token_ids)


def test_shapes_without_data(impl):
    routing = turnout.route(torch.empty(7, 16, device="meta"), SPEC, CONTRACT, impl=impl)
    real = turnout.route(torch.zeros(7, 16), SPEC, CONTRACT, impl="reference")
    for name, fake, want in zip(real._fields, routing, real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (want.shape, want.dtype, want.stride()), name


def test_a_routing_with_structures_is_a_pytree(impl, device):
    routing = turnout.route(make_logits("normal", 2, 16, device=device), SPEC, CONTRACT, impl=impl)
    same = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.clone(), routing)
    assert isinstance(same, turnout.Routing)
    assert_same(same, routing)
    assert isinstance(routing.permutation, turnout.Permutation)
    assert routing.permutation.block_schedule is routing.block_schedule


def operators_inside(call):
    """The names of the torch operators that run during a call, after one that warms up."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return {event.name for event in profiler.events() if "::" in event.name}


@pytest.fixture
def calls(kernel_device):
    """`turnout.permute` and `turnout.route`, for few slots and for many, as ``auto`` runs them here."""
    ids = make_ids("sentinels", 300, 16, 4, torch.int16, kernel_device)
    logits, weights = (
        make_logits("normal", 300, 16, torch.bfloat16, kernel_device),
        torch.ones(300, 4).to(kernel_device),
    )
    calls = []
    for count in (9, 300):
        calls += [
            lambda n=count: turnout.permute(ids[:n], 16, CONTRACT, topk_weights=weights[:n].contiguous()),
            lambda n=count: turnout.route(logits[:n], SPEC, CONTRACT),
        ]
    return calls


def test_the_operators_only_make_their_results(calls):
    for call in calls:
        assert operators_inside(call) <= ALLOWED | {"aten::slice", "aten::as_strided"}  # the slices are the test's own


def test_a_planted_copy_is_seen(calls, monkeypatch):
    launch_of = ops.launch_of

    def with_a_copy(room, impl, name="launch"):
        def launch(tensor, *arguments):
            launch_of(room, impl, name)(tensor.clone(), *arguments)

        return launch

    monkeypatch.setattr(ops, "launch_of", with_a_copy)
    for call in calls:
        assert "aten::clone" in operators_inside(call)
