"""triton_kernels (the copy in vLLM's wheel, or the package) reads what `route` wrote; its own routing is not called.

Neither is installed in CI: put a folder that holds ``vllm/`` on PYTHONPATH. Structures are compared with the library's
own torch functions on any machine; its matmul runs on a GPU.
"""

import pytest
import torch

import turnout
from turnout.integrations import triton_kernels as consumer
from turnout.testing.experts import SPECS, ExpertsInputs, assert_accurate, make_weights
from turnout.testing.inputs import make_logits
from turnout.testing.permutation import most_blocks

GPT_OSS = SPECS["gpt_oss"]
ROUTING_FUNCTIONS = ("routing", "routing_from_bitmatrix", "sort_tokens", "compute_expt_data", "prune_routing")


@pytest.fixture
def library():
    try:
        consumer.library("routing")
    except ImportError as error:
        pytest.skip(str(error))
    return consumer.library


@pytest.fixture
def no_routing(library, monkeypatch):
    """The library's routing raises."""

    def refuse(*_, **__):
        raise AssertionError("triton_kernels was asked to route")

    for name in ROUTING_FUNCTIONS:
        monkeypatch.setattr(library("routing"), name, refuse)
    for name in ("topk", "topk_forward"):
        monkeypatch.setattr(library("topk"), name, refuse)


def routed(num_tokens, device="cpu", num_experts=32, top_k=4, **inputs):
    spec = turnout.RouterSpec(num_experts=num_experts, top_k=top_k, renormalize=True)
    logits = make_logits("normal", num_tokens, num_experts, torch.bfloat16, device)
    return logits, turnout.route(logits, spec, consumer.CONTRACT, turnout.RoutingInputs(**inputs))


@pytest.mark.parametrize("num_tokens", [1, 5, 8, 9, 100, 700])
def test_the_objects_are_those_of_the_library_s_reference(num_tokens, library, monkeypatch, kernel_device):
    """`routing_torch` and `compute_expt_data_torch`, given the ids that `route` chose."""
    histc = torch.histc  # of integers, there is none on a CPU
    monkeypatch.setattr(torch, "histc", lambda ids, **options: histc(ids.float(), **options))
    logits, routing = routed(num_tokens, kernel_device)
    want_data, want_gather, want_scatter = library("routing").routing_torch(
        logits.float(), 4, expt_indx=routing.topk_ids
    )
    data, gather, scatter = consumer.routing_objects(routing)
    assert (data.n_expts_tot, data.n_expts_act) == (want_data.n_expts_tot, want_data.n_expts_act)
    for ours, theirs in (
        (data.expt_hist, want_data.expt_hist),
        (data.expt_data.hist, want_data.expt_data.hist),
        (data.expt_data.token_offs_raw, want_data.expt_data.token_offs_raw),
        (gather.src_indx, want_gather.src_indx),
        (gather.dst_indx, want_gather.dst_indx),
        (scatter.src_indx, want_scatter.src_indx),
        (scatter.dst_indx, want_scatter.dst_indx),
    ):
        assert ours.dtype == theirs.dtype == torch.int32
        assert torch.equal(ours, theirs)
    for block_size, want in want_data.expt_data.block_pid_map.items():
        assert torch.equal(data.expt_data.token_offs_pad[block_size], want_data.expt_data.token_offs_pad[block_size])
        assert torch.equal(data.expt_data.block_pid_map[block_size], want)
        assert len(want) == most_blocks(4 * num_tokens, 32, 16)
    assert data.gate_scal.dtype == torch.bfloat16
    torch.testing.assert_close(data.gate_scal.float(), want_data.gate_scal, rtol=2**-8, atol=0)


def test_nothing_is_made_for_the_objects(no_routing, kernel_device):
    """The arrays are the routing's own, or views of them."""
    _, routing = routed(9, kernel_device)
    data, gather, scatter = consumer.routing_objects(routing)
    pairs = [
        (data.gate_scal, routing.permuted_weights), (data.expt_hist, routing.tokens_per_expert),
        (data.expt_data.token_offs_raw, routing.expert_offsets), (gather.src_indx, routing.permuted_idx),
        (gather.dst_indx, routing.inv_permuted_idx), (scatter.dst_indx, routing.permuted_idx),
        *((view, routing.block_offsets) for view in data.expt_data.token_offs_pad.values()),
        *((view, routing.block_schedule) for view in data.expt_data.block_pid_map.values()),
    ]  # fmt: skip
    for array, source in pairs:
        assert array.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


def test_a_routing_of_another_contract_is_refused():
    spec = turnout.RouterSpec(num_experts=32, top_k=4, renormalize=True)
    logits = make_logits("normal", 3, 32)
    with pytest.raises(ValueError, match=r"reads tokens_per_expert of int32, .* is missing; route with turnout\.contr"):
        consumer.routing_objects(turnout.route(logits, spec, turnout.Contract()))
    wide = turnout.Contract(structures=consumer.CONTRACT.structures, structures_dtype=torch.int64)
    with pytest.raises(ValueError, match=r"reads tokens_per_expert of int32, .* is torch\.int64; route with"):
        consumer.routing_objects(turnout.route(logits, spec, wide))
    with pytest.raises(ValueError, match=r"hidden_states must be \[T, H\] of torch.bfloat16, got \[3, 8\] of torch.fl"):
        consumer.experts(torch.zeros(3, 8), None, None, GPT_OSS)
    with pytest.raises(ValueError, match="fuses the activation of gpt-oss in its layout"):
        consumer.pack(None, SPECS["silu"])


def layer_inputs(num_tokens, device, **padding):
    """A small layer of gpt-oss's form in bfloat16: 32 experts, 4 of them for each token."""
    sizes = {"num_experts": 32, "hidden_size": 256, "intermediate_size": 128}
    weights = make_weights(GPT_OSS, **sizes, dtype=torch.bfloat16)
    _, routing = routed(num_tokens, device, **padding)
    hidden_states = torch.randn(num_tokens, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    inputs = ExpertsInputs(hidden_states, weights, turnout.Routing(routing.topk_weights, routing.topk_ids), GPT_OSS)
    return inputs.to(device), routing


@pytest.fixture
def hopper(gpu):
    if gpu.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("matmul_ogs is run on NVIDIA's GPUs from Hopper on, as vLLM does")
    return gpu


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 15, 16, 17, 64, 257, 1024])
def test_a_layer_in_bfloat16(num_tokens, no_routing, hopper):
    """Through the library's own matmul: at most twice the error of a plain run against float64."""
    inputs, routing = layer_inputs(num_tokens, hopper)
    packed = consumer.pack(inputs.weights, GPT_OSS)
    assert_accurate(consumer.experts(inputs.hidden_states, packed, routing, GPT_OSS), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [7, 300])
def test_padding_carries_no_work(num_tokens, no_routing, hopper):
    padding = torch.arange(num_tokens, device=hopper) % 3 == 1
    inputs, routing = layer_inputs(num_tokens, hopper, is_padding=padding)
    inputs.hidden_states[padding] = float("nan")
    out = consumer.experts(inputs.hidden_states, consumer.pack(inputs.weights, GPT_OSS), routing, GPT_OSS)
    assert (out[padding] == 0).all()
    assert_accurate(out[~padding], inputs.rows(~padding))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 257])
def test_a_layer_in_mxfp4(num_tokens, no_routing, hopper):
    """Against the same weights after the library's quantisation and back."""
    inputs, routing = layer_inputs(num_tokens, hopper)
    mxfp = consumer.library("numerics_details.mxfp")
    rounded = [
        mxfp.upcast_from_mxfp(*mxfp.downcast_to_mxfp(weight, torch.uint8, axis=1), torch.bfloat16, axis=1)
        for weight in inputs.weights[:2]
    ]
    packed = consumer.pack(inputs.weights, GPT_OSS, mxfp4=True)
    try:
        out = consumer.experts(inputs.hidden_states, packed, routing, GPT_OSS)
    finally:
        consumer.library("matmul_ogs_details.opt_flags").reset_opt_flags_constraints()
    weights = inputs.weights._replace(gate_up_proj=rounded[0], down_proj=rounded[1])
    assert_accurate(out, ExpertsInputs(inputs.hidden_states, weights, inputs.routing, GPT_OSS))


@pytest.mark.gpu
def test_no_cast_and_no_copy_from_logits_to_output(no_routing, hopper):
    """The profiler inside route and the layer sees no copy; the graph captures, so nothing waits for the device."""
    inputs, _ = layer_inputs(16, hopper)
    packed = consumer.pack(inputs.weights, GPT_OSS)
    logits = make_logits("normal", 16, 32, torch.bfloat16, hopper)
    spec = turnout.RouterSpec(num_experts=32, top_k=4, renormalize=True)

    def layer():
        return consumer.experts(inputs.hidden_states, packed, turnout.route(logits, spec, consumer.CONTRACT), GPT_OSS)

    want = layer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        layer()
    seen = {event.name for event in profiler.events()}
    assert not seen & {"aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous"}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    graph.replay()
    assert torch.equal(out, want)
