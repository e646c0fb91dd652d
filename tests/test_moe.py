"""The whole layer: its stations one after the other, with nothing cast or copied between them."""

import dataclasses
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import turnout
from turnout.contracts import STRUCTURES
from turnout.experts.api import IMPLS
from turnout.router.api import project
from turnout.testing.checks import oracle as routing_oracle
from turnout.testing.experts import SPECS, ExpertsInputs, assert_within_tolerance, make_weights, oracle, plain_run

GEMMA4 = turnout.RouterSpec(
    num_experts=8, top_k=2, input_norm="rms_scale", renormalize=True, per_expert_scale=True, input_norm_eps=1e-5
)
QWEN = turnout.RouterSpec(num_experts=8, top_k=3, weights_rounding="input", router_bias=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIDDEN, INTERMEDIATE = 40, 24
ALLOCATIONS = ("aten::empty_strided", "aten::empty")


@pytest.fixture(params=["auto", *IMPLS])
def impl(request):
    if request.param in ("triton", "grouped"):
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


@pytest.fixture
def device(impl, kernel_device):
    return torch.device("cpu") if impl == "cpu" else kernel_device


def router_of(spec, dtype, device):
    rng = torch.Generator().manual_seed(3)
    experts = spec.num_experts
    proj = torch.randn(experts, HIDDEN, generator=rng) / 4
    bias = torch.randn(experts, generator=rng).to(device, dtype) if spec.router_bias else None
    scale = (torch.rand(HIDDEN, generator=rng) + 0.5).to(device, dtype) if spec.input_norm != "none" else None
    return turnout.RouterWeights(proj.to(device, dtype), bias, scale)


def inputs_of(spec, device, **given):
    scale = torch.linspace(0.5, 2, spec.num_experts, device=device) if spec.per_expert_scale else None
    return turnout.RoutingInputs(per_expert_scale=scale, **given)


def layer_of(router_spec, dtype, device, num_tokens=5, experts="gelu_tanh"):
    """The positional arguments of `turnout.moe`."""
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
    experts_spec = SPECS[experts]
    weights = make_weights(experts_spec, router_spec.num_experts, HIDDEN, INTERMEDIATE, dtype)
    weights = turnout.ExpertsWeights(*(None if w is None else w.to(device) for w in weights))
    router = router_of(router_spec, dtype, device)
    inputs = inputs_of(router_spec, device)
    return hidden_states.to(device, dtype), router, weights, router_spec, experts_spec, inputs


def stock_logits(hidden_states, router, spec):
    """The first station in a stock model's operations (Gemma 4's norm is written as in transformers)."""
    if spec.input_norm == "rms_scale":
        wide = hidden_states.float()
        mean_squared = wide.pow(2).mean(-1, keepdim=True) + spec.input_norm_eps
        hidden_states = (wide * torch.pow(mean_squared, -0.5)).type_as(hidden_states)
        hidden_states = hidden_states * router.scale * HIDDEN**-0.5
    return torch.nn.functional.linear(hidden_states, router.proj, router.bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [GEMMA4, QWEN], ids=["gemma4", "qwen"])
def test_the_router_is_bitwise_a_stock_one(spec, dtype):
    hidden_states, router, *_ = layer_of(spec, dtype, "cpu", num_tokens=33)
    logits = project(hidden_states, router, spec)
    assert logits.dtype == dtype
    assert torch.equal(logits, stock_logits(hidden_states, router, spec))


def test_a_router_in_float32():
    spec = dataclasses.replace(QWEN, projection_dtype="float32")
    hidden_states, router, *_ = layer_of(spec, torch.bfloat16, "cpu")
    logits = project(hidden_states, router, spec)
    wide = turnout.RouterWeights(router.proj.float(), router.bias.float())
    assert logits.dtype == torch.float32
    assert torch.equal(logits, stock_logits(hidden_states.float(), wide, spec))


@pytest.mark.parametrize("experts", ["gelu_tanh", "gpt_oss"])
@pytest.mark.parametrize("spec", [GEMMA4, QWEN], ids=["gemma4", "qwen"])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_a_layer_against_oracles(num_tokens, spec, experts, impl, device):
    """Routing and experts by their own oracles, from the logits of the layer's router."""
    arguments = layer_of(spec, torch.float32, device, num_tokens, experts)
    hidden_states, router, weights, _, experts_spec, inputs = arguments
    out = turnout.moe(*arguments, impl=impl)
    assert (out.shape, out.dtype) == (hidden_states.shape, hidden_states.dtype)
    want_weights, want_ids = routing_oracle(project(hidden_states, router, spec), spec, inputs)
    routing = turnout.Routing(*(torch.from_numpy(array).to(device) for array in (want_weights, want_ids)))
    right = ExpertsInputs(hidden_states, weights, routing, experts_spec)
    float32 = dataclasses.replace(right, routing=routing._replace(topk_weights=routing.topk_weights.float()))
    assert_within_tolerance(out, oracle(right), plain_run(float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_is_its_stations(dtype, impl, device):
    """To the bit: nothing else happens, and what the routing launch writes is what the experts compute themselves."""
    if impl == "grouped" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    hidden_states, router, weights, router_spec, experts_spec, inputs = arguments = layer_of(GEMMA4, dtype, device)
    logits = project(hidden_states, router, router_spec)
    routing = turnout.route(logits, router_spec, turnout.Contract(ids_dtype=torch.int64), inputs)
    want = turnout.experts(hidden_states, weights, routing, experts_spec, impl=impl)
    assert torch.equal(turnout.moe(*arguments, impl=impl), want)


def test_padding_gives_zeros_and_is_not_read(impl, device):
    *arguments, inputs = layer_of(GEMMA4, torch.float32, device, num_tokens=7)
    want = turnout.moe(*arguments, inputs, impl=impl, batch_invariant=True)
    arguments[0][4:] = float("nan")
    valid = torch.tensor([4], dtype=torch.int32, device=device)
    padded = dataclasses.replace(inputs, num_valid_tokens=valid)
    out = turnout.moe(*arguments, padded, impl=impl, batch_invariant=True)
    assert torch.equal(out[:4], want[:4])
    assert (out[4:] == 0).all()


def test_the_router_may_read_something_else(impl, device):
    """Gemma 4 norms what its experts read, and not what its router reads."""
    hidden_states, router, weights, router_spec, experts_spec, inputs = layer_of(GEMMA4, torch.float32, device)
    others = hidden_states.flip(0).contiguous()
    inputs = dataclasses.replace(inputs, router_hidden_states=others)
    out = turnout.moe(hidden_states, router, weights, router_spec, experts_spec, inputs, impl=impl)
    contract = turnout.Contract(sentinel=-1)
    routing = turnout.route(project(others, router, router_spec), router_spec, contract, inputs)
    assert torch.equal(out, turnout.experts(hidden_states, weights, routing, experts_spec, impl=impl))


def test_cold_fullgraph_compile_with_any_number_of_tokens(impl, device):
    torch._dynamo.reset()
    counter = CompileCounter()

    def layer(hidden_states, router, weights, inputs):
        return turnout.moe(hidden_states, router, weights, GEMMA4, SPECS["gelu_tanh"], inputs, impl=impl)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (5, 3, 9):
        hidden_states, router, weights, _, _, inputs = layer_of(GEMMA4, torch.float32, device, num_tokens)
        assert torch.equal(
            compiled(hidden_states, router, weights, inputs), layer(hidden_states, router, weights, inputs)
        )
    # On a GPU "auto" takes one implementation for few tokens and one for many: a graph each.
    assert counter.frame_count == (2 if impl == "auto" and device.type != "cpu" else 1)


def test_cold_compile_of_a_rank_in_a_fresh_process(kernel_device):
    """Nothing imported or called before: contracts are looked up, and made for the rank, while the compiler traces."""
    script = f"""
        import torch, turnout
        torch.manual_seed(0)
        shapes = (5, 16), (8, 16), (3, 24, 16), (3, 16, 12)
        x, proj, gate_up, down = (torch.randn(shape, device="{kernel_device}") for shape in shapes)
        expert_map = torch.tensor([-1, 2, -1, 0, -1, -1, 1, -1], dtype=torch.int32, device="{kernel_device}")

        specs = turnout.RouterSpec(num_experts=8, top_k=2, renormalize=True), turnout.ExpertsSpec()

        def layer(x):
            weights = turnout.RouterWeights(proj), turnout.ExpertsWeights(gate_up, down)
            return turnout.moe(x, *weights, *specs, turnout.RoutingInputs(expert_map=expert_map))

        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(compiled, layer(x))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_no_cast_between_the_stations(kernel_device):
    """From the logits on, what torch is asked for is buffers: read with the profiler inside of the operators."""
    arguments = layer_of(QWEN, torch.bfloat16, kernel_device)
    turnout.moe(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        turnout.moe(*arguments)
    names = [event.name for event in profiler.events() if "::" in event.name]
    # On a GPU these are many tokens for so few experts, and the routing launch writes their order, too.
    route = "turnout::route" if kernel_device.type == "cpu" else "turnout::route_permuted"
    after_the_router = set(names[names.index(route) :])
    assert {route, "turnout::experts"} <= after_the_router <= {route, "turnout::experts", *ALLOCATIONS}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, reference.*'cuda'"),
        ({"router": ()}, TypeError, r"router must be a turnout\.RouterWeights, got tuple"),
        ({"scale": None}, ValueError, "input_norm='rms_scale', but RouterWeights.scale is missing"),
        ({"bias": torch.zeros(8)}, ValueError, "router_bias=False, but RouterWeights.bias is given"),
        ({"proj": torch.zeros(7, HIDDEN)}, ValueError, r"router.proj must be \[8, 40\] of .*, got \[7, 40\]"),
        ({"proj": torch.zeros(8, HIDDEN).half()}, ValueError, "router.proj must be .* of torch.float32, got .*float16"),
        ({"hidden_states": torch.zeros(2, 3, HIDDEN)}, ValueError, r"hidden_states must be \[T, H\], got shape"),
        ({"hidden_states": torch.zeros(HIDDEN)}, ValueError, r"hidden_states must be \[T, H\], got shape \[40\]"),
        ({"hidden_states": [1.0]}, TypeError, "hidden_states must be a tensor, got list"),
        ({"router_spec": "gemma4"}, TypeError, "router_spec must be a turnout.RouterSpec, got str"),
        ({"experts_spec": GEMMA4}, TypeError, "spec must be a turnout.ExpertsSpec, got RouterSpec"),
        ({"num_experts": 9}, ValueError, "among 9 experts, the weights hold 8"),
    ],
)
def test_refusals(change, error, match):
    hidden_states, router, weights, router_spec, experts_spec, inputs = layer_of(GEMMA4, torch.float32, "cpu")
    parts = {name: value for name, value in change.items() if name in router._fields}
    given = {
        "hidden_states": hidden_states, "router": router._replace(**parts), "weights": weights,
        "router_spec": router_spec, "experts_spec": experts_spec, "inputs": inputs,
    }  # fmt: skip
    given |= {name: value for name, value in change.items() if name in given or name == "impl"}
    if "num_experts" in change:
        given["router_spec"] = dataclasses.replace(router_spec, num_experts=change["num_experts"])
    with pytest.raises(error, match=match):
        turnout.moe(**given)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_ranks_that_share_the_experts_make_up_the_layer(num_tokens, impl, device):
    """Each rank holds some experts, and a map of which; its result is its share of the sum."""
    hidden_states, router, weights, router_spec, experts_spec, inputs = layer_of(
        GEMMA4, torch.float32, device, num_tokens
    )
    total = torch.zeros_like(hidden_states)
    for mine in ([0, 3, 4], [7, 1, 2, 5, 6]):
        expert_map = torch.full((8,), -1, dtype=torch.int32, device=device)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32, device=device)
        local = turnout.ExpertsWeights(*(None if weight is None else weight[mine] for weight in weights))
        given = dataclasses.replace(inputs, expert_map=expert_map)
        total += turnout.moe(hidden_states, router, local, router_spec, experts_spec, given, impl=impl)
    want = turnout.moe(hidden_states, router, weights, router_spec, experts_spec, inputs, impl=impl)
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-6)


def test_fewer_experts_need_a_map():
    """A router of 8 experts, weights of 7: refused, for an id past them would be skipped in silence."""
    hidden_states, router, weights, router_spec, experts_spec, inputs = layer_of(GEMMA4, torch.float32, "cpu")
    fewer = weights._replace(gate_up_proj=weights.gate_up_proj[:7], down_proj=weights.down_proj[:7])
    with pytest.raises(ValueError, match=r"among 8 experts, the weights hold 7; .* RoutingInputs\.expert_map"):
        turnout.moe(hidden_states, router, fewer, router_spec, experts_spec, inputs)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_experts_take_whatever_structure_a_routing_has(structure, impl, device):
    """One that the implementation does not read does no harm, nor a padded block map in part."""
    hidden_states, router, weights, router_spec, experts_spec, inputs = layer_of(GEMMA4, torch.float32, device)
    blocks = 16 if structure in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded") else None
    contract = turnout.Contract(sentinel=-1, structures=(structure,), block_size=blocks)
    routing = turnout.route(project(hidden_states, router, router_spec), router_spec, contract, inputs)
    assert getattr(routing, structure) is not None
    out = turnout.experts(hidden_states, weights, routing, experts_spec, impl=impl)
    want = turnout.experts(hidden_states, weights, turnout.Routing(*routing[:2]), experts_spec, impl=impl)
    assert torch.equal(out, want)
