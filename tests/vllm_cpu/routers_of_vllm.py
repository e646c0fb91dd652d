"""Routers of vLLM made by hand, what their specs are, and layers bound to turnout around them; no engine."""

import importlib.util
import types

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router import (
    custom_routing_router,
    fused_topk_bias_router,
    fused_topk_router,
    grouped_topk_router,
    zero_expert_router,
)

import turnout
from turnout.integrations._vllm_layer import RoutedLayer

E, K, T = 16, 4, 33
COMMON = {"top_k": K, "global_num_experts": E}
BIAS = torch.nn.Parameter(torch.linspace(-0.3, 0.3, E).flip(0), requires_grad=False)
TABLE = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(row))[:K] for row in range(50)]).int()


def softmax_sum(hidden_states, gating_output, topk, renormalize):
    """A custom function that turnout does not know."""
    topk_weights, topk_ids = torch.softmax(gating_output.float(), -1).topk(topk)
    return topk_weights / topk_weights.sum(-1, keepdim=True), topk_ids


def biased_topk(logits, _, bias, top_k, *further):
    """In place of an operator that vLLM's build for this CPU lacks."""
    factor = further[-2]
    topk_ids = (torch.nn.functional.softplus(logits).sqrt() + bias).topk(top_k).indices
    return hash_topk(logits, topk_ids, factor)


def hash_topk(logits, topk_ids, *further):
    """Likewise."""
    factor = further[-1]
    topk_weights = torch.nn.functional.softplus(logits).sqrt().gather(1, topk_ids.long())
    return topk_weights / topk_weights.sum(-1, keepdim=True) * factor, topk_ids.int()


def gemma4_function():
    """The custom function of Gemma 4, and the module whose scales it reads: its router, before 0.31 its layer."""
    from vllm.model_executor.models import gemma4

    is_method = hasattr(gemma4.Gemma4Router, "routing_function")
    kind = gemma4.Gemma4Router if is_method else gemma4.Gemma4MoE
    owner = kind.__new__(kind)
    torch.nn.Module.__init__(owner)
    owner.per_expert_scale = torch.nn.Parameter(torch.linspace(0.5, 1.5, E))
    if is_method:
        return owner.routing_function, owner
    constants = kind.__init__.__code__.co_consts
    code = next(each for each in constants if getattr(each, "co_name", "") == "routing_function")
    function = types.FunctionType(code, vars(gemma4), code.co_name, None, (types.CellType(owner),))
    function.__qualname__ = f"{kind.__name__}.__init__.<locals>.routing_function"
    return function, owner


class Gemma4MoE:
    """With a closure of the name that the layer of vLLM 0.26 to 0.30 makes."""

    def __init__(self):
        self.per_expert_scale = torch.nn.Parameter(torch.linspace(0.5, 1.5, E))

        def routing_function(hidden_states, gating_output, topk, renormalize):
            raise AssertionError(f"not called, since turnout knows it; only read for its {self}")

        routing_function.__module__ = "vllm.model_executor.models.gemma4"
        self.routing_function = routing_function


def spec(**fields):
    return turnout.RouterSpec(num_experts=E, top_k=K, **fields)


def cpu_router():
    """The module of vLLM's router for CPUs."""
    name = "vllm.model_executor.layers.fused_moe.router.cpu_router"
    if importlib.util.find_spec(name) is None:
        pytest.skip("this vLLM has no CPURouter (0.30 has): its experts for CPUs route by themselves")
    return importlib.import_module(name)


def cpu(**fields):
    return cpu_router().CPURouter(**{**COMMON, **fields})


def bias_router(**fields):
    fields = {"e_score_correction_bias": BIAS, "renormalize": True, **fields}
    return fused_topk_bias_router.FusedTopKBiasRouter(**COMMON, **fields)


def grouped(**fields):
    return grouped_topk_router.GroupedTopKRouter(**COMMON, **{"num_expert_group": 4, "topk_group": 2, **fields})


GROUPS = {"num_expert_group": 4, "topk_group": 2}
EXPRESSED = {
    "fused": (
        lambda: fused_topk_router.FusedTopKRouter(**COMMON, renormalize=False),
        spec(),
    ),
    "fused sigmoid": (
        lambda: fused_topk_router.FusedTopKRouter(**COMMON, scoring_func="sigmoid"),
        spec(scoring_func="sigmoid", renormalize=True),
    ),
    "bias": (
        lambda: bias_router(scoring_func="sigmoid", routed_scaling_factor=2.5),
        spec(scoring_func="sigmoid", e_score_correction_bias=True, routed_scaling_factor=2.5, renormalize=True),
    ),
    "sqrtsoftplus": (
        lambda: bias_router(scoring_func="sqrtsoftplus"),
        spec(scoring_func="sqrtsoftplus", e_score_correction_bias=True, renormalize=True),
    ),
    "hash": (
        lambda: bias_router(scoring_func="sqrtsoftplus", hash_indices_table=TABLE, e_score_correction_bias=None),
        spec(scoring_func="sqrtsoftplus", hash_routing=True, renormalize=True),
    ),
    "grouped": (
        lambda: grouped(scoring_func="softmax", renormalize=False, routed_scaling_factor=16.0),
        spec(routed_scaling_factor=16.0, **GROUPS),
    ),
    "grouped bias": (
        lambda: grouped(scoring_func="sigmoid", e_score_correction_bias=BIAS),
        spec(
            scoring_func="sigmoid", e_score_correction_bias=True, group_score="top2_sum", renormalize=True, **GROUPS
        ),
    ),
    "groups that do not divide": (
        lambda: grouped(num_expert_group=5, scoring_func="sigmoid", routed_scaling_factor=16.0),
        spec(renormalize=True),
    ),
    "zero experts": (
        lambda: zero_expert_router.ZeroExpertRouter(
            **COMMON, e_score_correction_bias=BIAS, num_logical_experts=12, zero_expert_type="identity"
        ),
        spec(e_score_correction_bias=True, num_null_experts=4),
    ),
    "Gemma 4": (
        lambda: custom_routing_router.CustomRoutingRouter(
            **COMMON, custom_routing_function=gemma4_function()[0]
        ),
        spec(renormalize=True, per_expert_scale=True),
    ),
    "Gemma 4 before 0.31": (
        lambda: custom_routing_router.CustomRoutingRouter(
            **COMMON, custom_routing_function=Gemma4MoE().routing_function
        ),
        spec(renormalize=True, per_expert_scale=True),
    ),
    "CPU": (lambda: cpu(renormalize=False), spec()),
    "CPU grouped": (
        lambda: cpu(use_grouped_topk=True, scoring_func="sigmoid", e_score_correction_bias=BIAS, **GROUPS),
        spec(
            scoring_func="sigmoid", e_score_correction_bias=True, group_score="top2_sum", renormalize=True, **GROUPS
        ),
    ),
    "CPU sigmoid": (lambda: cpu(scoring_func="sigmoid"), spec(scoring_func="sigmoid", renormalize=True)),
    "CPU sigmoid bias": (
        lambda: cpu(scoring_func="sigmoid", e_score_correction_bias=BIAS, routed_scaling_factor=2.5),
        spec(scoring_func="sigmoid", e_score_correction_bias=True, routed_scaling_factor=2.5, renormalize=True),
    ),
    "CPU sqrtsoftplus": (
        lambda: cpu(scoring_func="sqrtsoftplus", e_score_correction_bias=BIAS, routed_scaling_factor=1.5),
        spec(
            scoring_func="sqrtsoftplus", e_score_correction_bias=True, renormalize=True, routed_scaling_factor=1.5
        ),
    ),
    "CPU hash": (
        lambda: cpu(scoring_func="sqrtsoftplus", hash_indices_table=TABLE),
        spec(scoring_func="sqrtsoftplus", hash_routing=True, renormalize=True),
    ),
    "CPU Gemma 4": (
        lambda: cpu(custom_routing_function=gemma4_function()[0]),
        spec(renormalize=True, per_expert_scale=True),
    ),
}  # fmt: skip


class Dispatcher:
    """A prepare/finalize that declares a dtype; vLLM has some for int64 and int32."""

    def __init__(self, ids_dtype):
        self.ids_dtype = ids_dtype

    def topk_indices_dtype(self):
        return self.ids_dtype


class CPUUnquantizedExperts:
    pass


class UnheardOfExperts:
    pass


def kernel(experts=CPUUnquantizedExperts, ids_dtype=None):
    return types.SimpleNamespace(prepare_finalize=Dispatcher(ids_dtype), fused_experts=experts())


def layer_of(router, ids_dtype=None, experts=CPUUnquantizedExperts):
    """A bound layer, with the parts of vLLM's that the binding looks at."""
    routed_experts = torch.nn.Linear(1, 1)
    routed_experts.quant_method = types.SimpleNamespace(moe_kernel=kernel(experts, ids_dtype))
    routed_experts.forward_monolithic = routed_experts.forward_modular = None
    runner = types.SimpleNamespace(layer_name="layers.0.experts", router=router, routed_experts=routed_experts)
    layer = RoutedLayer(runner, "routing", lambda: None)
    layer.install()
    return layer


def drawn(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    hidden_states, logits = torch.randn(T, 32, generator=rng), torch.randn(T, E, generator=rng)
    return hidden_states, logits.to(dtype), torch.randint(0, len(TABLE), (T,), generator=rng)


def copies_of(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = call()
    return result, sum(event.name in ("aten::copy_", "aten::_to_copy") for event in profile.events())


def scattered(routing):
    """[T, E]: weights at their experts, whatever their order."""
    topk_weights, topk_ids = routing
    return torch.zeros(T, E).scatter_(1, topk_ids.long(), topk_weights)
