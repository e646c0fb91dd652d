"""What only a GPU can show: launches in a captured graph, no synchronisation, addresses beyond 32 bits, bfloat16.

The other tests of this folder run natively on a GPU, too: their fixture ``device`` is that GPU for the Triton
implementation.
"""

import ctypes

import pytest
import torch
from remap_cases import bits, make_ids, make_map, make_rows

import turnout
from turnout.integrations.vllm_xpu_kernels import XpuFusedMoe, consumer
from turnout.remap.api import remap_hidden_states

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda(gpu):
    if gpu.type != "cuda":
        pytest.skip(f"graphs are captured through torch.cuda; this machine has {gpu.type}")
    return gpu


def captured(call):
    """A graph of one call, and what the call returned."""
    call()  # compiles
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        result = call()
    graph.instantiate()
    return graph, result


def nodes_of(graph):
    count = ctypes.c_size_t()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    assert ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    return count.value


@pytest.mark.skipif(torch.version.hip is not None, reason="nodes are counted through the CUDA driver")
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("num_tokens", "launches"), [(1, 2), (16, 2), (128, 2), (129, 3), (4096, 3), (40000, 3)])
def test_three_launches_at_most(num_tokens, launches, ids_dtype, cuda):
    """Two where the slots fit a tile of 1024. The graph has no other node: no fill, no cast, no copy."""
    rows, expert_map = make_rows(num_tokens, 64, torch.bfloat16, cuda), make_map(128, 32, cuda)
    ids = make_ids("uniform", num_tokens, 8, 128, ids_dtype, cuda)
    graph, _ = captured(lambda: remap_hidden_states(rows, ids, 32, expert_map=expert_map))
    assert nodes_of(graph) == launches


def make_layer(device, num_experts, hidden, intermediate, dtype=torch.bfloat16, **changed):
    rng = torch.Generator(device).manual_seed(0)
    w13 = torch.randn(num_experts, hidden, 2 * intermediate, generator=rng, device=device) / hidden**0.5
    w2 = torch.randn(num_experts, intermediate, hidden, generator=rng, device=device) / intermediate**0.5
    return XpuFusedMoe(w13.to(dtype), None, None, w2.to(dtype), None, None, 8, "gelu_tanh", num_experts, **changed)


@pytest.mark.skipif(torch.version.hip is not None, reason="nodes are counted through the CUDA driver")
@pytest.mark.parametrize("version", ["0.1.7", "0.1.16.2"])
@pytest.mark.parametrize(("num_tokens", "launches"), [(1, 6), (4096, 7)])
def test_launches_from_logits_to_output(num_tokens, launches, version, cuda):
    """Routing, two or three to remap, two GEMMs, the gather: no cast of ids, whichever dtype is read."""
    router = turnout.RouterSpec(num_experts=128, top_k=8, renormalize=True)
    logits = torch.randn(num_tokens, 128, device=cuda)
    hidden_states = torch.randn(num_tokens, 256, device=cuda).bfloat16()
    layer, output, contract = (
        make_layer(cuda, 128, 256, 64),
        torch.empty_like(hidden_states),
        consumer(version).contract,
    )

    def call():
        routing = turnout.route(logits, router, contract)
        layer.apply(output, hidden_states, routing.topk_weights, routing.topk_ids)

    graph, _ = captured(call)
    assert nodes_of(graph) == launches


def test_a_replay_reads_the_new_ids(cuda):
    rows, ids = make_rows(200, 64, torch.bfloat16, cuda), make_ids("uniform", 200, 8, 60, device=cuda)
    graph, result = captured(lambda: remap_hidden_states(rows, ids, 60))
    ids.copy_(make_ids("one_hot", 200, 8, 60, device=cuda, seed=1))
    graph.replay()
    want = remap_hidden_states(rows, ids, 60, impl="reference")
    for one, other in zip(result[:3], want[:3], strict=True):
        assert (bits(one) == bits(other)).all()


def test_no_synchronisation(cuda):
    hidden_states, topk_weights = torch.randn(64, 256, device=cuda).bfloat16(), torch.rand(64, 8, device=cuda)
    ids = make_ids("uniform", 64, 8, 128, device=cuda)
    layer, output = make_layer(cuda, 128, 256, 64), torch.empty_like(hidden_states)
    layer.apply(output, hidden_states, topk_weights, ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.apply(output, hidden_states, topk_weights, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("with_map", [False, True], ids=["local_ids", "expert_map"])
def test_many_tokens(with_map, ids_dtype, gpu):
    """Hundreds of tiles, the last of them not full; more experts than a block of them."""
    for num_tokens, num_experts in ((20001, 128), (4097, 1000)):
        num_total = 2 * num_experts if with_map else num_experts
        rows, ids = (
            make_rows(num_tokens, 24, torch.bfloat16, gpu),
            make_ids("skewed", num_tokens, 8, num_total, ids_dtype, gpu),
        )
        expert_map = make_map(num_total, num_experts, gpu) if with_map else None
        got, want = (
            remap_hidden_states(rows, ids, num_experts, expert_map=expert_map, impl=impl)
            for impl in ("triton", "reference")
        )
        for one, other in zip(got[:3], want[:3], strict=True):
            assert (bits(one) == bits(other)).all()


@pytest.mark.parametrize("num_tokens", [1, 17, 257, 4096])
@pytest.mark.parametrize("kind", ["uniform", "skewed", "one_hot"])
def test_the_layer_in_bfloat16_at_gemma_4_geometry(kind, num_tokens, gpu):
    """Half of E=128, H=2816, I=704 under a map; at most twice a plain bfloat16 run's error against float64."""
    layer, expert_map = make_layer(gpu, 64, 2816, 704), make_map(128, 64, gpu)
    rng = torch.Generator(gpu).manual_seed(num_tokens)
    hidden_states = torch.randn(num_tokens, 2816, generator=rng, device=gpu).bfloat16()
    topk_weights = torch.rand(num_tokens, 8, generator=rng, device=gpu)
    ids = make_ids(kind, num_tokens, 8, 128, torch.int32, gpu)
    output = torch.full_like(hidden_states, torch.nan)
    layer.apply(output, hidden_states, topk_weights, ids, expert_map)
    local = expert_map[ids.long()]
    want = by_the_rules(torch.float64, layer, hidden_states, topk_weights, local)
    plain = by_the_rules(torch.bfloat16, layer, hidden_states, topk_weights, local)
    assert (output.double() - want).abs().max() <= 2 * (plain.double() - want).abs().max()


def by_the_rules(dtype, layer, hidden_states, topk_weights, local):
    """The layer with every operation in one dtype."""
    x, weights, out = hidden_states.to(dtype), topk_weights.to(dtype), torch.zeros_like(hidden_states, dtype=dtype)
    for expert in range(layer.num_experts):
        token, k = (local == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ layer.w13[expert].to(dtype)).chunk(2, dim=-1)
        values = torch.nn.functional.gelu(gate, approximate="tanh") * up
        out.index_add_(0, token, values @ layer.w2[expert].to(dtype) * weights[token, k][:, None])
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_flat_index_beyond_two_to_the_31_vllm_xpu_kernels_269(dtype, gpu):
    """262144 tokens of 2048 columns, 8 experts each: as in the test that came with the fix there, 4.3e9 elements."""
    needed = 9 * 262144 * 2048 * dtype.itemsize
    if gpu.type == "cuda" and torch.cuda.mem_get_info()[0] < 1.1 * needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GB of GPU memory")
    tokens = torch.arange(262144, device=gpu)
    rows = (tokens[:, None] * 2048 + torch.arange(2048, device=gpu)).to(torch.int32) % 251
    rows = rows.to(torch.uint8).view(dtype) if dtype.itemsize == 1 else rows.to(torch.int16).view(dtype)
    ids = make_ids("uniform", 262144, 8, 128, torch.int32, gpu)
    result = remap_hidden_states(rows, ids, 128)
    last = bits(result.inv_permuted_idx)[[0, 1, 131072, 262143]]
    assert int(last.max()) * 2048 > 2**31
    for token, positions in zip((0, 1, 131072, 262143), last, strict=True):
        for position in positions:
            assert (bits(result.hidden_states[position]) == bits(rows[token])).all()
    # Where every row went, by its first element and its last: rows in order of position, compared on the device.
    integers = torch.uint8 if dtype.itemsize == 1 else torch.int16
    positions = result.inv_permuted_idx.flatten().long()
    for column in (0, 2047):
        got = result.hidden_states.view(integers)[:, column][positions]
        assert torch.equal(got, rows.view(integers)[:, column].repeat_interleave(8))
