"""Parity with the routers that transformers runs: their own modules, with random weights."""

import pytest
import torch
from transformers import (
    FlexOlmoConfig,
    Gemma4TextConfig,
    JambaConfig,
    MiniMaxConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoTopKRouter
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter
from transformers.models.jamba.modeling_jamba import JambaTopKRouter
from transformers.models.minimax.modeling_minimax import MiniMaxTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextTopKRouter

import turnout
from turnout.testing.checks import WEIGHTS_TOLERANCE

HIDDEN_SIZE, NUM_TOKENS = 64, 16
SIZES = {"hidden_size": HIDDEN_SIZE, "num_experts_per_tok": 4}

ROUTERS = {
    "gemma4": (
        Gemma4TextRouter,
        Gemma4TextConfig(enable_moe_block=True, num_experts=24, top_k_experts=4, hidden_size=HIDDEN_SIZE),
    ),
    "mixtral": (MixtralTopKRouter, MixtralConfig(num_local_experts=24, **SIZES)),
    "qwen2_moe": (Qwen2MoeTopKRouter, Qwen2MoeConfig(num_experts=24, **SIZES)),
    "qwen2_moe_renormalized": (Qwen2MoeTopKRouter, Qwen2MoeConfig(num_experts=24, norm_topk_prob=True, **SIZES)),
    "qwen3_moe": (Qwen3MoeTopKRouter, Qwen3MoeConfig(num_experts=24, **SIZES)),
    "qwen3_moe_renormalized": (Qwen3MoeTopKRouter, Qwen3MoeConfig(num_experts=24, norm_topk_prob=True, **SIZES)),
    "olmoe": (OlmoeTopKRouter, OlmoeConfig(num_experts=24, **SIZES)),
    "flex_olmo": (FlexOlmoTopKRouter, FlexOlmoConfig(num_experts=24, **SIZES)),
    "jamba": (JambaTopKRouter, JambaConfig(num_experts=24, **SIZES)),
    "minimax": (MiniMaxTopKRouter, MiniMaxConfig(num_local_experts=24, **SIZES)),
    "qwen3_next": (Qwen3NextTopKRouter, Qwen3NextConfig(num_experts=24, **SIZES)),
    "qwen3_5_moe": (Qwen3_5MoeTopKRouter, Qwen3_5MoeTextConfig(num_experts=24, **SIZES)),
}
EACH_ROUTER = pytest.mark.parametrize("name", ROUTERS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def routed_by_both(name, dtype, impl, device):
    """The logits of a router with random weights, its weights and ids, and turnout's of the same logits."""
    make, config = ROUTERS[name]
    torch.manual_seed(0)
    router = make(config).to(dtype).to(device).eval()
    for parameter in router.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if parameter.dim() == 1 else torch.nn.init.normal_(
            parameter, std=0.3
        )
    hidden_states = torch.randn(NUM_TOKENS, HIDDEN_SIZE).to(dtype).to(device)
    logits = []
    with recorded_linear(logits):
        _, topk_weights, topk_ids = router(hidden_states)
    inputs = turnout.RoutingInputs(per_expert_scale=getattr(router, "per_expert_scale", None))
    contract = turnout.Contract(ids_dtype=topk_ids.dtype, weights_dtype=topk_weights.dtype)
    spec = turnout.RouterSpec.from_config(config)
    return logits[0], (topk_weights, topk_ids), turnout.route(logits[0], spec, contract, inputs, impl=impl)


class recorded_linear(torch.overrides.TorchFunctionMode):
    """Keep what ``F.linear`` returns: a router's projection gives its logits, whatever the router returns."""

    def __init__(self, results):
        self.results = results

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear:
            self.results.append(result)
        return result


@EACH_ROUTER
def test_float32_routing_is_the_models(name, impl, device):
    _, (topk_weights, topk_ids), got = routed_by_both(name, torch.float32, impl, device)
    assert torch.equal(got.topk_ids, topk_ids)
    assert_weights_equal(got.topk_weights, topk_weights)


@EACH_ROUTER
def test_bfloat16_routing_is_the_models_up_to_ties_at_the_boundary(name, impl, device):
    """The sets of experts are equal but where the K-th and the next logit are: there any choice is right."""
    logits, (topk_weights, topk_ids), got = routed_by_both(name, torch.bfloat16, impl, device)
    best = logits.float().sort(dim=-1, descending=True).values
    decided = best[:, 3] != best[:, 4]
    assert decided.sum() >= 12  # of 16 rows

    def by_expert(weights, ids):  # ties within the K may lie in another order
        return weights.new_zeros(NUM_TOKENS, 24).scatter_(1, ids, weights)[decided]

    assert_weights_equal(by_expert(got.topk_weights, got.topk_ids), by_expert(topk_weights, topk_ids))


def assert_weights_equal(got, want):
    """float32 weights within the tolerance; 16-bit weights were rounded where the model rounds: equal."""
    assert got.dtype == want.dtype
    assert torch.equal(got != 0, want != 0)
    tolerance = WEIGHTS_TOLERANCE * want.abs().clamp(min=1) if want.dtype == torch.float32 else 0
    assert ((got - want).abs() <= tolerance).all(), (got - want).abs().max()
