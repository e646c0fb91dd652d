"""Our `cpu` experts beside vLLM's own, on the same inputs: its operator of today, and its torch path before 0.28.

PR #40565 named vLLM's CPU experts as a reader of int64 ids. There were two readers: the compiled operator, which reads
int32 and refuses all else, and a path in plain torch, which reads int64. Routing writes either, and neither is cast.
"""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import turnout

ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda gate: nn.functional.gelu(gate, approximate="tanh"),
}
# T, E, K, H, I: one token, K = 1, K = E, experts without tokens; vLLM wants H and I divisible by 32.
SIZES = [(1, 8, 2, 64, 32), (5, 12, 1, 32, 96), (17, 16, 4, 96, 64), (33, 6, 6, 64, 32), (16, 128, 8, 64, 32)]
# Errors against float64: of one rounding of the output, and of the activation's before it. Either side may have both.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Layer(NamedTuple):
    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    weights: turnout.ExpertsWeights
    spec: turnout.RouterSpec

    def routing(self, contract):
        contract = turnout.contracts[contract] if isinstance(contract, str) else contract
        return turnout.route(self.router_logits, self.spec, contract, impl="cpu")


def drawn(sizes, dtype, routing="uniform"):
    num_tokens, num_experts, top_k, hidden_size, intermediate_size = sizes
    rng = torch.Generator().manual_seed(sum(sizes))

    def normal(*shape):
        return torch.randn(shape, generator=rng)

    logits = normal(num_tokens, num_experts)
    if routing == "one_hot":
        logits[:, num_experts // 2] += 20
    weights = turnout.ExpertsWeights(
        (normal(num_experts, 2 * intermediate_size, hidden_size) / hidden_size**0.5).to(dtype),
        (normal(num_experts, hidden_size, intermediate_size) / intermediate_size**0.5).to(dtype),
    )
    spec = turnout.RouterSpec(num_experts=num_experts, top_k=top_k, renormalize=True)
    return Layer(normal(num_tokens, hidden_size).to(dtype), logits, weights, spec)


def oracle(layer, routing, activation):
    """[T, H] in float64, one slot after the other."""
    out = torch.zeros(layer.hidden_states.shape, dtype=torch.float64)
    for token, (ids, weights) in enumerate(zip(routing.topk_ids, routing.topk_weights, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = (layer.weights.gate_up_proj[expert].double() @ layer.hidden_states[token].double()).chunk(2)
            values = ACTIVATIONS[activation](gate) * up
            out[token] += weight.double() * (layer.weights.down_proj[expert].double() @ values)
    return out


def error(out, exact):
    assert out.shape == exact.shape
    return float((out.double() - exact).norm() / exact.norm())


def run_operator(ops, layer, routing, activation):
    """As ``CPUUnquantizedExperts`` of vLLM 0.32 packs its weights and applies itself."""
    packed = [ops.cpu_prepack_moe_weight(weight, "vec") for weight in layer.weights[:2]]
    out = torch.full_like(layer.hidden_states, float("nan"))
    topk_weights, topk_ids = routing[:2]
    ops.cpu_fused_moe(out, layer.hidden_states, *packed, None, None, topk_weights, topk_ids, activation, "vec", False)
    return out


def run_torch_path(module, layer, routing, activation):
    """As ``CPUFusedMOE`` of vLLM 0.26 runs where its compiled operator does not serve."""
    experts = nn.Module()
    experts.w13_weight, experts.w2_weight = (nn.Parameter(weight, requires_grad=False) for weight in layer.weights[:2])
    moe = module.CPUFusedMOE.__new__(module.CPUFusedMOE)  # its constructor would choose the operator
    moe.init_moe_torch(experts)
    topk_weights, topk_ids = routing[:2]
    activation = module.MoEActivation.from_str(activation)
    return moe.forward_torch(
        experts, layer.hidden_states, topk_weights, topk_ids, activation, global_num_experts=layer.spec.num_experts
    )


def casts_in(call):
    """How many tensors a call converts to another dtype, in operators of torch and inside of others."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name == "aten::_to_copy" for event in profile.events())


@pytest.mark.parametrize("routing", ["uniform", "one_hot"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_our_experts_agree_with_vllms_operator(dtype, activation, sizes, routing, vllm_ops):
    layer = drawn(sizes, dtype, routing)
    int32, int64 = layer.routing("vllm.cpu_unquantized"), layer.routing(turnout.Contract(ids_dtype=torch.int64))
    exact = oracle(layer, int64, activation)
    theirs = run_operator(vllm_ops, layer, int32, activation)
    spec = turnout.ExpertsSpec(activation=activation)
    ours = turnout.experts(layer.hidden_states, layer.weights, int32, spec, impl="cpu")
    assert error(theirs, exact) <= TOLERANCE[dtype]
    assert error(ours, exact) <= TOLERANCE[dtype]
    assert torch.equal(ours, turnout.experts(layer.hidden_states, layer.weights, int64, spec, impl="cpu"))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_our_experts_agree_with_vllms_torch_path(dtype, activation, sizes, torch_path):
    layer = drawn(sizes, dtype)
    routing = layer.routing("vllm.cpu_torch_fallback")
    assert routing.topk_ids.dtype == torch.int64
    exact = oracle(layer, routing, activation)
    theirs = run_torch_path(torch_path, layer, routing, activation)
    spec = turnout.ExpertsSpec(activation=activation)
    ours = turnout.experts(layer.hidden_states, layer.weights, routing, spec, impl="cpu")
    # Four roundings where there are two here: both projections, the activation and its product with up.
    assert error(theirs, exact) <= 2 * TOLERANCE[dtype]
    assert error(ours, exact) <= TOLERANCE[dtype]


def test_the_operator_reads_what_routing_wrote(vllm_ops):
    layer = drawn((17, 16, 4, 96, 64), torch.bfloat16)
    routing = layer.routing("vllm.cpu_unquantized")
    assert routing.topk_ids.dtype == torch.int32
    assert routing.topk_weights.dtype == torch.float32
    assert routing.topk_ids.is_contiguous()
    assert routing.topk_weights.is_contiguous()
    assert casts_in(lambda: run_operator(vllm_ops, layer, routing, "silu")) == 0
    before = run_operator(vllm_ops, layer, routing, "silu")
    routing.topk_ids[:, 0] = routing.topk_ids[:, 0].roll(1)  # in place: were it copied once, nothing would change
    assert not torch.equal(run_operator(vllm_ops, layer, routing, "silu"), before)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int16])
def test_the_operator_refuses_other_ids(ids_dtype, vllm_ops):
    layer = drawn((5, 8, 2, 64, 32), torch.bfloat16)
    routing = layer.routing(turnout.Contract(ids_dtype=ids_dtype))
    with pytest.raises(RuntimeError, match="expected scalar type Int but found"):
        run_operator(vllm_ops, layer, routing, "silu")


def test_the_torch_path_casts_int32_and_takes_int64_as_it_is(torch_path):
    layer = drawn((17, 16, 4, 96, 64), torch.float32)  # of float32: its outputs need no cast to the weights' dtype
    routings = {name: layer.routing(name) for name in ("vllm.cpu_unquantized", "vllm.cpu_torch_fallback")}
    casts = {
        name: casts_in(lambda routing=routing: run_torch_path(torch_path, layer, routing, "silu"))
        for name, routing in routings.items()
    }
    assert casts == {"vllm.cpu_unquantized": 2, "vllm.cpu_torch_fallback": 0}  # the ids, and then their counts
