"""What the plugin makes of each router class of vLLM, held against what the router itself computes."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not in this environment; `make test-vllm` makes one where it is")

from routers_of_vllm import (
    BIAS,
    COMMON,
    EXPRESSED,
    E,
    K,
    UnheardOfExperts,
    bias_router,
    biased_topk,
    copies_of,
    cpu,
    cpu_router,
    drawn,
    gemma4_function,
    grouped,
    hash_topk,
    kernel,
    layer_of,
    scattered,
)
from vllm.model_executor.layers.fused_moe.router import custom_routing_router, fused_topk_router

import turnout
from turnout.integrations._vllm_consumers import DISPATCHERS, EXPERTS, consumer_of
from turnout.integrations._vllm_routers import NotExpressedError, routable


@pytest.mark.parametrize("name", EXPRESSED)
def test_the_spec_of_each_router(name):
    make, expected = EXPRESSED[name]
    assert routable(make(), E).spec == expected


@pytest.mark.parametrize(
    "name", ["CPU", "CPU grouped", "CPU sqrtsoftplus", "CPU hash", "CPU Gemma 4", "Gemma 4", "grouped", "grouped bias"]
)
@torch.inference_mode()
def test_routers_that_run_on_a_cpu_agree_with_ours(name, monkeypatch):
    if name.startswith("CPU"):
        monkeypatch.setattr(cpu_router(), "biased_topk_cpu", biased_topk)  # operators of builds for other CPUs
        monkeypatch.setattr(cpu_router(), "hash_topk_cpu", hash_topk)
    router = EXPRESSED[name][0]()
    hidden_states, logits, input_ids = drawn()
    theirs = router._select_experts(hidden_states, logits, input_ids=input_ids)
    layer = layer_of(router)
    ours, copies = copies_of(lambda: router.select_experts(hidden_states, logits, input_ids=input_ids))
    assert layer.plan.state == "routed", layer.plan.reason
    assert (ours[0].dtype, ours[1].dtype) == (torch.float32, torch.int32)
    torch.testing.assert_close(scattered(ours), scattered(theirs), rtol=0, atol=5e-7)
    assert copies == 0


@torch.inference_mode()
def test_a_bias_that_vllms_router_for_cpus_leaves_out_is_applied_and_said():
    hidden_states, logits, _ = drawn()
    router = cpu(e_score_correction_bias=BIAS)
    layer = layer_of(router)
    chosen = (logits.softmax(-1) + BIAS).topk(K).indices
    weights = logits.softmax(-1).gather(1, chosen)
    expected = scattered((weights / weights.sum(-1, keepdim=True), chosen))
    torch.testing.assert_close(scattered(router.select_experts(hidden_states, logits)), expected)
    assert "with the selection bias" in layer.plan.reason


def test_what_no_spec_says_stays_with_vllm():
    image_tokens, shared = bias_router(scoring_func="sqrtsoftplus"), bias_router(num_fused_shared_experts=1)
    image_tokens.bias_vl = BIAS
    for router, reason in ((image_tokens, "image tokens"), (shared, "shared experts")):
        with pytest.raises(NotExpressedError, match=reason):
            routable(router, E)
    with pytest.raises(NotExpressedError, match="top_k=4 experts do not fit"):
        routable(grouped(num_expert_group=8, topk_group=1), E)


def test_subclasses_and_replaced_methods_stay_with_vllm(monkeypatch):
    class Other(fused_topk_router.FusedTopKRouter):
        pass

    with pytest.raises(NotExpressedError, match=r"does not know the router class .*Other"):
        routable(Other(**COMMON), E)
    monkeypatch.setattr(fused_topk_router.FusedTopKRouter, "_compute_routing", lambda *_, **__: None)
    with pytest.raises(NotExpressedError, match="replaced by another tool"):
        routable(fused_topk_router.FusedTopKRouter(**COMMON), E)


@torch.inference_mode()
def test_per_expert_scales_are_read_at_each_call():
    function, owner = gemma4_function()
    router = custom_routing_router.CustomRoutingRouter(**COMMON, custom_routing_function=function)
    layer_of(router)
    hidden_states, logits, _ = drawn()
    before = router.select_experts(hidden_states, logits)[0]
    owner.per_expert_scale = torch.nn.Parameter(torch.linspace(1.0, 3.0, E))
    torch.testing.assert_close(router.select_experts(hidden_states, logits)[0], 2 * before)


def test_every_consumer_is_in_the_catalogue():
    for name in (*EXPERTS.values(), *DISPATCHERS.values()):
        assert name in turnout.contracts


def test_a_dispatchers_declaration_goes_before_the_experts():
    declared = consumer_of(kernel(ids_dtype=torch.int64), torch.int64)
    assert (declared.kind, declared.contract.ids_dtype) == ("Dispatcher", torch.int64)
    undeclared = consumer_of(kernel(), None)
    assert (undeclared.name, undeclared.contract.ids_dtype) == ("vllm.cpu_unquantized", torch.int32)
    unknown = consumer_of(kernel(UnheardOfExperts), None)
    assert (unknown.name, unknown.contract.ids_dtype) == (None, torch.int32)
    assert "unknown consumer UnheardOfExperts" in unknown.reason
