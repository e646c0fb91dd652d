"""What a bound layer hands to its consumer: dtypes, storage, replicas, zero experts, simulated ids; no engine."""

import dataclasses
import types

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not in this environment; `make test-vllm` makes one where it is")

from routers_of_vllm import (
    BIAS,
    COMMON,
    EXPRESSED,
    E,
    K,
    T,
    bias_router,
    copies_of,
    cpu,
    drawn,
    layer_of,
    softmax_sum,
)
from vllm.model_executor.layers.fused_moe.router import (
    custom_routing_router,
    routing_simulator_router,
    zero_expert_router,
)

import turnout
from turnout.integrations import _vllm_routers, _vllm_select
from turnout.integrations._vllm_routers import routable


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32, torch.uint32, torch.int16], ids=str)
@pytest.mark.parametrize("name", ["CPU", "CPU Gemma 4", "CPU grouped", "Gemma 4", "grouped bias", "fused"])
@torch.inference_mode()
def test_dispatchers_of_each_dtype_get_it_without_a_cast(name, ids_dtype):
    router = EXPRESSED[name][0]()
    hidden_states, logits, _ = drawn()
    layer = layer_of(router, ids_dtype)
    select = lambda: router.select_experts(hidden_states, logits, topk_indices_dtype=ids_dtype)
    (topk_weights, topk_ids), copies = copies_of(select)
    assert layer.plan.state == "routed", layer.plan.reason
    assert (topk_ids.dtype, copies) == (ids_dtype, 0)
    expected = turnout.route(
        logits, layer.plan.select.known.spec, turnout.Contract(ids_dtype=torch.int64),
        layer.plan.select.known.inputs(None, None), impl="reference",
    )  # fmt: skip
    assert torch.equal(topk_ids.long(), expected.topk_ids)
    torch.testing.assert_close(topk_weights, expected.topk_weights, rtol=0, atol=2e-7)


@pytest.mark.parametrize("asked", [None, torch.int32, torch.int64, torch.uint32], ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("make", [custom_routing_router.CustomRoutingRouter, cpu], ids=["custom", "CPU"])
def test_foreign_functions_give_the_asked_dtype_and_their_own_storage_where_it_is_that(
    make, ids_dtype, weights_dtype, asked
):
    given = []

    def foreign(**arguments):
        topk_weights, topk_ids = softmax_sum(**arguments)
        given[:] = topk_weights.to(weights_dtype), topk_ids.to(ids_dtype)
        return tuple(given)

    router = make(**{**COMMON, "custom_routing_function": foreign})
    layer = layer_of(router, asked)
    hidden_states, logits, _ = drawn()
    result = router.select_experts(hidden_states, logits, topk_indices_dtype=asked)
    wanted = (torch.float32, asked or torch.int32)
    assert layer.plan.state == "strict"
    assert "custom routing function" in layer.plan.reason
    for tensor, source, dtype in zip(result, given, wanted, strict=True):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, source.to(dtype))
        assert (tensor is source) == (source.dtype == dtype)


def test_a_foreign_function_with_strides_is_made_contiguous_for_experts_on_a_cpu():
    def foreign(**arguments):
        topk_weights, topk_ids = softmax_sum(**arguments)
        return topk_weights.t().contiguous().t(), topk_ids.int().t().contiguous().t()

    router = cpu(custom_routing_function=foreign)
    layer_of(router)
    hidden_states, logits, _ = drawn()
    result = router.select_experts(hidden_states, logits)
    assert all(tensor.is_contiguous() for tensor in result)


def test_logical_ids_are_captured(monkeypatch):
    router = EXPRESSED["CPU"][0]()
    layer_of(router)
    captured = []
    router.set_capture_fn(captured.append)
    hidden_states, logits, _ = drawn()
    topk_ids = router.select_experts(hidden_states, logits)[1]
    assert captured[0] is topk_ids


@torch.inference_mode()
def test_padding_gets_id_minus_one_and_weight_zero(monkeypatch):
    is_padding = torch.arange(2 * T) >= T - 3
    here = types.SimpleNamespace(
        VLLM_MOE_SKIP_PADDING=True,
        is_forward_context_available=lambda: True,
        get_forward_context=lambda: types.SimpleNamespace(is_padding=is_padding),
    )
    monkeypatch.setattr(_vllm_routers, "_padding_environment", lambda: (here, here))
    known, contract = routable(EXPRESSED["fused"][0](), E), turnout.Contract(sentinel=-1)
    assert known.skips_padding
    select = _vllm_select.choose_select(None, known, contract, torch.device("cpu"))
    hidden_states, logits, _ = drawn()
    topk_weights, topk_ids = select(hidden_states, logits, None)
    expected = turnout.route(logits, known.spec, contract)
    assert torch.equal(topk_ids, expected.topk_ids.masked_fill(is_padding[:T, None], -1))
    assert torch.equal(topk_weights, expected.topk_weights.masked_fill(is_padding[:T, None], 0))


@torch.inference_mode()
def test_replicas_are_chosen_and_counted_as_vllm_does():
    """Its kernel needs a GPU; here are its words: Knuth's hash of the row chooses, padding is not counted."""
    router = bias_router(scoring_func="sigmoid")
    hidden_states, logits, _ = drawn()
    known, num_physical, counted = routable(router, E), E + 6, 20
    replicas = torch.full((E, 3), -1)
    replicas[:, 0], replicas[:6, 1] = torch.arange(E), torch.arange(E, num_physical)
    state = types.SimpleNamespace(
        logical_to_physical_map=replicas,
        logical_replica_count=(replicas >= 0).sum(-1),
        expert_load_view=torch.zeros(num_physical, dtype=torch.int32),
        should_record_tensor=torch.ones((), dtype=torch.bool),
        num_unpadded_tokens_tensors=[torch.tensor(counted, dtype=torch.int32)],
    )
    router.eplb_state = state
    contract = turnout.Contract(ids_dtype=torch.int64, sentinel=-1, id_space="physical")
    known = dataclasses.replace(known, skips_padding=False)
    topk_weights, topk_ids = _vllm_select.RouteToReplicas(router, known, contract)(hidden_states, logits, None)
    logical = turnout.route(logits, known.spec, turnout.Contract(), known.inputs(None, None))
    hashed = (torch.arange(T) * 2654435769 & 0xFFFFFFFF).unsqueeze(1) % state.logical_replica_count[logical.topk_ids]
    assert torch.equal(topk_ids, replicas[logical.topk_ids, hashed])
    assert torch.equal(topk_weights, logical.topk_weights)
    assert torch.equal(state.expert_load_view, topk_ids[:counted].flatten().bincount(minlength=num_physical).int())


@torch.inference_mode()
def test_zero_experts_are_computed_and_masked(monkeypatch):
    def zero_experts_compute(expert_indices, expert_scales, num_experts, zero_expert_type, hidden_states):
        weight = expert_scales.masked_fill(expert_indices < num_experts, 0).sum(-1, keepdim=True)
        expert_indices.fill_(-7)  # as vLLM's kernel, it writes into what it is given
        return weight * hidden_states

    monkeypatch.setattr(zero_expert_router, "zero_experts_compute_triton", zero_experts_compute)
    _vllm_select._zero_experts_compute_of.cache_clear()
    router = EXPRESSED["zero experts"][0]()
    layer = layer_of(router)
    hidden_states, logits, _ = drawn()
    topk_weights, topk_ids = router.select_experts(hidden_states, logits)
    assert layer.plan.state == "routed", layer.plan.reason
    scores = logits.softmax(-1)
    chosen = (scores + BIAS).topk(K).indices
    zero = chosen >= 12
    torch.testing.assert_close(topk_weights, scores.gather(1, chosen).masked_fill(zero, 0))
    assert torch.equal(topk_ids, chosen.masked_fill(zero, 0).int())
    expected = scores.gather(1, chosen).masked_fill(~zero, 0).sum(-1, keepdim=True) * hidden_states
    torch.testing.assert_close(router.zero_expert_output, expected)
    _vllm_select._zero_experts_compute_of.cache_clear()


def test_the_simulator_takes_the_consumers_dtype(monkeypatch):
    strategy = types.SimpleNamespace(VLLM_MOE_ROUTING_SIMULATION_STRATEGY="uniform_random")
    monkeypatch.setattr(routing_simulator_router, "envs", strategy)  # an engine has frozen the environment
    router = routing_simulator_router.RoutingSimulatorRouter(**COMMON)
    hidden_states, logits, _ = drawn()
    assert router.select_experts(hidden_states, logits)[1].dtype == torch.int64  # which experts on a CPU refuse
    layer = layer_of(router)
    assert router.select_experts(hidden_states, logits)[1].dtype == torch.int32
    assert layer.plan.state == "simulated"


def test_an_error_in_route_surfaces(monkeypatch):
    router = EXPRESSED["CPU"][0]()
    layer_of(router)
    hidden_states, logits, _ = drawn()
    with pytest.raises(ValueError, match=r"must be float32, bfloat16 or float16, got torch\.float64"):
        router.select_experts(hidden_states, logits.double())


def test_a_removed_layer_is_vllms_again():
    router = EXPRESSED["CPU"][0]()
    layer_of(router).remove()
    assert "_select_experts" not in router.__dict__
