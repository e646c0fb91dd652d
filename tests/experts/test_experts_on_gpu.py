"""What only a GPU can show of experts: launches in a captured graph, bfloat16 products, addresses beyond 32 bits."""

import pytest
import torch

import turnout
from turnout.bench.layer_case import Geometry, draw_case, draw_layers
from turnout.bench.layer_check import expected_output
from turnout.bench.timing import launches
from turnout.experts.api import choose_impl, contract_of
from turnout.router.api import project

pytestmark = pytest.mark.gpu
GEMMA4 = Geometry()
SMALL = Geometry(num_experts=16, top_k=4, hidden_size=256, intermediate_size=128)
# E no power of two, sizes that no tile divides; and K = 1, K = E.
UNEVEN = Geometry(num_experts=60, top_k=5, hidden_size=328, intermediate_size=152, activation="silu")
ONE = Geometry(num_experts=24, top_k=1, hidden_size=200, intermediate_size=72, activation="gelu", dtype="float16")
ALL = Geometry(num_experts=6, top_k=6, hidden_size=96, intermediate_size=320)
NUM_TOKENS = (1, 2, 15, 16, 17, 64, 257, 1024)


@pytest.fixture
def cuda(gpu):
    if gpu.type != "cuda":
        pytest.skip(f"graphs are captured through torch.cuda; this machine has {gpu.type}")
    return gpu


def drawn(geometry, num_tokens, device, routing="uniform", layers=1):
    generator = torch.Generator(device).manual_seed(num_tokens)
    return draw_case(geometry, num_tokens, routing, draw_layers(geometry, layers, generator), generator)


def layer_of(case, impl="auto", batch_invariant=False):
    """The layer from its logits on, for the i-th inputs of a case."""
    router_spec, experts_spec = case.geometry.router_spec, case.geometry.experts_spec
    top_k, num_experts = router_spec.top_k, router_spec.num_experts
    if impl == "auto":
        impl = choose_impl(case.hidden_states[0], top_k, num_experts, batch_invariant).impl
    contract = contract_of(impl, case.num_tokens * top_k, num_experts)

    def call(i):
        hidden_states, router_logits, weights, scale = case.at(i)
        routing = turnout.route(router_logits, router_spec, contract, turnout.RoutingInputs(per_expert_scale=scale))
        return turnout.experts(
            hidden_states, weights, routing, experts_spec, impl=impl, batch_invariant=batch_invariant
        )

    return call


@pytest.mark.parametrize(("num_tokens", "most"), [(1, 3), (12, 3), (16, 4), (128, 4), (1024, 6)])
def test_launches_of_a_layer(num_tokens, most, cuda):
    """One for routing, two for the experts of few tokens; a weighted sum, and the order of many slots, beside."""
    case = drawn(GEMMA4, num_tokens, cuda)
    assert launches(layer_of(case)) <= most


def test_a_layer_of_one_token_takes_four_launches(cuda):
    """`turnout.moe` from hidden states on: one for the router's projection, at most three follow it."""
    case = drawn(GEMMA4, 1, cuda)
    hidden_states, _, weights, scale = case.at(0)
    router = turnout.RouterWeights(torch.randn(128, 2816, device=cuda).bfloat16() / 50)
    router_spec, experts_spec = GEMMA4.router_spec, GEMMA4.experts_spec
    inputs = turnout.RoutingInputs(per_expert_scale=scale)
    whole = launches(lambda i: turnout.moe(hidden_states, router, weights, router_spec, experts_spec, inputs))
    assert launches(lambda i: project(hidden_states, router, router_spec)) == 1
    assert whole <= 4


@pytest.mark.parametrize("num_tokens", [1, 16, 257])
@pytest.mark.parametrize("impl", ["triton", "grouped"])
def test_no_synchronisation(impl, num_tokens, cuda):
    call = layer_of(drawn(SMALL, num_tokens, cuda), impl)
    call(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("routing", ["uniform", "skewed", "one_hot"])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("geometry", [SMALL, UNEVEN, ONE, ALL], ids=["small", "uneven", "one", "all"])
@pytest.mark.parametrize("impl", ["triton", "grouped"])
def test_errors_are_at_most_twice_those_of_a_plain_run(impl, geometry, num_tokens, routing, gpu):
    case = drawn(geometry, num_tokens, gpu, routing, layers=2)
    call = layer_of(case, impl)
    for i in (0, 1):
        expected = expected_output(case, i)
        expected.poison_free_memory()
        expected.check(impl, call(i))


@pytest.mark.parametrize("num_tokens", [1, 8, 16, 128, 2048])
def test_errors_at_the_sizes_of_gemma4(num_tokens, gpu):
    case = drawn(GEMMA4, num_tokens, gpu)
    expected = expected_output(case, 0)
    for impl in ("triton", "grouped") if num_tokens <= 128 else ("grouped",):
        expected.poison_free_memory()
        expected.check(impl, layer_of(case, impl)(0))


@pytest.mark.parametrize("impl", ["triton", "grouped"])
def test_no_tokens(impl, gpu):
    case = drawn(SMALL, 1, gpu)._replace(
        hidden_states=torch.empty(1, 0, 256, dtype=torch.bfloat16, device=gpu),
        router_logits=torch.empty(1, 0, 16, device=gpu),
    )
    assert layer_of(case, impl)(0).shape == (0, 256)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["by_itself", "asked_for"])
@pytest.mark.parametrize("geometry", [SMALL, UNEVEN, GEMMA4], ids=["small", "uneven", "gemma4"])
@pytest.mark.parametrize("impl", ["triton", "grouped"])
def test_rows_do_not_depend_on_their_batch(impl, geometry, batch_invariant, gpu):
    """Bit for bit, as DESIGN promises of each implementation: 1, 17 and 2048 tokens are on both sides of every tile."""
    case = drawn(geometry, 2048 if impl == "grouped" else 257, gpu)
    whole = layer_of(case, impl, batch_invariant)(0)
    for start, num_tokens in ((0, 1), (3, 17), (100, 157)):
        rows = slice(start, start + num_tokens)
        part = case._replace(
            hidden_states=case.hidden_states[:, rows], router_logits=case.router_logits[:, rows].contiguous()
        )
        assert torch.equal(layer_of(part, impl, batch_invariant)(0), whole[rows]), f"{num_tokens} tokens"


@pytest.mark.parametrize("impl", ["triton", "grouped"])
def test_runs_give_the_same_bits(impl, gpu):
    case = drawn(SMALL, 257, gpu, "one_hot")
    call = layer_of(case, impl)
    first = call(0)
    assert all(torch.equal(call(0), first) for _ in range(5))


@pytest.mark.parametrize("num_tokens", [1, 16, 257])
def test_a_replay_computes_the_new_inputs(num_tokens, cuda):
    case = drawn(SMALL, num_tokens, cuda)
    call = layer_of(case)
    call(0)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(0)
    case.hidden_states[0].copy_(case.hidden_states[1])
    case.router_logits[0].copy_(case.router_logits[1])
    out.fill_(float("nan"))
    graph.replay()
    expected_output(case, 0).check("replay", out)


@pytest.mark.parametrize("impl", ["triton", "grouped"])
def test_padding_is_neither_read_nor_left_over(impl, gpu):
    case = drawn(SMALL, 40, gpu)
    valid = torch.tensor([23], dtype=torch.int32, device=gpu)
    expected = expected_output(case, 0)
    hidden_states, router_logits, weights, scale = case.at(0)
    hidden_states[23:] = float("nan")
    inputs = turnout.RoutingInputs(per_expert_scale=scale, num_valid_tokens=valid)
    routing = turnout.route(router_logits, SMALL.router_spec, contract_of(impl, 160, 16), inputs)
    out = turnout.experts(hidden_states, weights, routing, SMALL.experts_spec, impl=impl)
    assert (out[23:] == 0).all()
    expected._replace(exact=expected.exact[:23]).check(impl, out[:23])


@pytest.mark.parametrize("impl", ["triton", "grouped"])
@pytest.mark.parametrize("num_tokens", [3, 300])
def test_weights_beyond_two_to_the_31(num_tokens, impl, gpu):
    """The chosen experts lie past 2^31 elements; those before are NaN, and never read."""
    geometry = Geometry(num_experts=560, top_k=2, hidden_size=2816, intermediate_size=1408)
    shapes = (560, 2816, 2816), (560, 2816, 1408)
    weights = [torch.full(shape, float("nan"), dtype=torch.bfloat16, device=gpu) for shape in shapes]
    for weight in weights:
        weight[-8:] = torch.randn_like(weight[-8:]) / weight.shape[2] ** 0.5
    case = drawn(Geometry(num_experts=560, top_k=2, hidden_size=2816, intermediate_size=8), num_tokens, gpu)
    layer = (turnout.ExpertsWeights(*weights), case.layers[0][1])
    case.router_logits[..., -8:] += 20
    case = case._replace(geometry=geometry, layers=[layer])
    expected_output(case, 0).check(impl, layer_of(case, impl)(0))


def test_slots_beyond_two_to_the_31(gpu):
    """Outputs of slots that lie past 2^31 elements: 4.6 GB of them."""
    geometry = Geometry(num_experts=8, top_k=8, hidden_size=2816, intermediate_size=64)
    case = drawn(geometry, 64, gpu)
    num_tokens = 2**31 // (8 * 2816) + 64
    hidden_states, router_logits, *_ = case.at(0)
    many = case._replace(
        hidden_states=torch.zeros(1, num_tokens, 2816, dtype=torch.bfloat16, device=gpu),
        router_logits=torch.zeros(1, num_tokens, 8, device=gpu),
    )
    many.hidden_states[0, -64:] = hidden_states
    many.router_logits[0, -64:] = router_logits
    expected_output(case, 0).check("grouped", layer_of(many, "grouped")(0)[-64:])
