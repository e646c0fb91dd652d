"""What only a GPU can show: launches in a captured graph, no synchronisation, addresses beyond 32 bits.

The other tests of this folder run natively on a GPU, too: their fixture ``device`` is that GPU for the Triton
implementation.
"""

import ctypes

import pytest
import torch

import turnout
from turnout.testing.checks import assert_bitwise_equal, assert_matches_oracle
from turnout.testing.inputs import make_logits, poisoned_out

pytestmark = pytest.mark.gpu
GEMMA4 = turnout.RouterSpec(num_experts=128, top_k=8, renormalize=True, per_expert_scale=True)
CONTRACT = turnout.Contract(ids_dtype=torch.int64, sentinel=-1)


@pytest.fixture
def cuda(gpu):
    if gpu.type != "cuda":
        pytest.skip(f"graphs are captured through torch.cuda; this machine has {gpu.type}")
    return gpu


def inputs_on(device, num_tokens):
    return turnout.RoutingInputs(
        per_expert_scale=torch.linspace(0.5, 1.5, 128, dtype=torch.bfloat16, device=device),
        is_padding=torch.arange(num_tokens, device=device) % 7 == 3,
    )


def captured(call):
    """A graph of one call, and what the call returned."""
    call()  # compiles
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        result = call()
    graph.instantiate()
    return graph, result


@pytest.mark.skipif(torch.version.hip is not None, reason="nodes are counted through the CUDA driver")
@pytest.mark.parametrize("num_tokens", [1, 16, 4096])
@pytest.mark.parametrize("ids_dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_one_launch_per_route(ids_dtype, num_tokens, cuda):
    """The captured graph has one node: no cast, fill or copy beside the kernel."""
    contract = turnout.Contract(ids_dtype=ids_dtype, weights_dtype=torch.bfloat16, sentinel=-1)
    logits, inputs = make_logits("normal", num_tokens, 128, device=cuda), inputs_on(cuda, num_tokens)
    graph, _ = captured(lambda: turnout.route(logits, GEMMA4, contract, inputs))
    count = ctypes.c_size_t()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    assert ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    assert count.value == 1


def test_a_replay_routes_the_new_logits(cuda):
    logits, inputs = make_logits("normal", 33, 128, device=cuda), inputs_on(cuda, 33)
    out = poisoned_out(33, 8, CONTRACT, cuda)
    graph, routing = captured(lambda: turnout.route(logits, GEMMA4, CONTRACT, inputs, out=out.tensors))
    logits.copy_(make_logits("bit_patterns", 33, 128, device=cuda))
    graph.replay()
    assert_matches_oracle(routing, logits, GEMMA4, CONTRACT, inputs)


def test_no_synchronisation(cuda):
    logits, inputs = make_logits("normal", 16, 128, device=cuda), inputs_on(cuda, 16)
    turnout.route(logits, GEMMA4, CONTRACT, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        turnout.route(logits, GEMMA4, CONTRACT, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [2048, 2049, 20001])
def test_many_rows(num_tokens, dtype, gpu):
    """Both sides of the sizes at which the tile changes; the last tile is not full."""
    for name in ("normal", "quantised", "bit_patterns"):
        logits, inputs = make_logits(name, num_tokens, 128, dtype, gpu), inputs_on(gpu, num_tokens)
        for _ in range(2):  # the second call finds the kernel compiled
            out = poisoned_out(num_tokens, 8, CONTRACT, gpu)
            routing = turnout.route(logits, GEMMA4, CONTRACT, inputs, out=out.tensors)
            assert out.topk_ids.guards_hold()
            assert out.topk_weights.guards_hold()
            assert_matches_oracle(routing, logits, GEMMA4, CONTRACT, inputs)


def test_kernels_are_not_mixed_up(gpu):
    """Calls that differ in one thing each, in turn: what is kept of one call must not serve another."""
    aligned = make_logits("quantised", 8, 128, device=gpu)
    unaligned = torch.cat([aligned.new_zeros(1), aligned.flatten()])[1:].view(8, 128)
    wide = torch.cat([aligned, aligned], dim=1)[:, :128]
    for _ in range(2):
        for logits in (aligned, unaligned, wide, aligned.bfloat16(), aligned.half(), aligned[:1], aligned[2:3]):
            for contract in (CONTRACT, turnout.Contract(), turnout.Contract(weights_dtype=torch.float16, sentinel=-1)):
                for top_k, renormalize in ((8, True), (8, False), (7, True)):
                    spec = turnout.RouterSpec(num_experts=128, top_k=top_k, renormalize=renormalize)
                    assert_matches_oracle(turnout.route(logits, spec, contract), logits, spec, contract)


def test_flat_index_beyond_two_to_the_31_vllm_xpu_kernels_269(gpu):
    """Rows whose first logit lies past 2^31 elements; 16-bit logits, 4.3 GB of them."""
    spec = turnout.RouterSpec(num_experts=128, top_k=8, renormalize=True)
    logits = torch.zeros(2**31 // 128 + 8, 128, dtype=torch.bfloat16, device=gpu)
    logits[-8:] = make_logits("tie_free", 8, 128, torch.bfloat16, gpu)
    want = turnout.route(logits[-8:].clone(), spec, CONTRACT)
    whole = turnout.route(logits, spec, CONTRACT)
    assert_bitwise_equal(turnout.Routing(whole.topk_weights[-8:], whole.topk_ids[-8:]), want)
    far_apart = logits[:: len(logits) - 1]  # a row stride beyond 2^31
    assert torch.equal(turnout.route(far_apart, spec, CONTRACT).topk_ids[1], want.topk_ids[-1])


def test_implementations_of_other_devices_are_refused(gpu):
    logits = make_logits("normal", 2, 128, device=gpu)
    spec = turnout.RouterSpec(num_experts=128, top_k=8)
    with pytest.raises(ValueError, match=r"impl='cpu' needs logits on a CPU, got .*use impl='triton' or impl='auto'"):
        turnout.route(logits, spec, CONTRACT, impl="cpu")
    with pytest.raises(ValueError, match="impl='triton' needs logits on a GPU, got a CPU tensor; use impl='cpu'"):
        turnout.route(logits.cpu(), spec, CONTRACT, impl="triton")
    scaled = turnout.RoutingInputs(per_expert_scale=torch.ones(128))
    with pytest.raises(ValueError, match="per_expert_scale is on cpu, router_logits on"):
        turnout.route(logits, GEMMA4, CONTRACT, scaled)


@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two GPUs")
def test_logits_on_the_device_that_is_not_current(gpu):
    second = torch.device(gpu.type, 1)
    logits = make_logits("normal", 5, 128, device=second)
    for _ in range(2):
        routing = turnout.route(logits, GEMMA4, CONTRACT, inputs_on(second, 5))
        assert_matches_oracle(routing, logits, GEMMA4, CONTRACT, inputs_on(second, 5))
