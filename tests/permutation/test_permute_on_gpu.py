"""What only a GPU can show: launches in a captured graph, no synchronisation, many slots.

The other tests of this folder run natively on a GPU, too.
"""

import ctypes

import pytest
import torch

import turnout
from turnout.contracts import STRUCTURES
from turnout.testing.checks import assert_matches_oracle
from turnout.testing.inputs import make_logits
from turnout.testing.permutation import assert_permutation_matches, make_ids

pytestmark = pytest.mark.gpu
GEMMA4 = turnout.RouterSpec(num_experts=128, top_k=8, renormalize=True)
CONTRACT = turnout.Contract(structures=STRUCTURES, block_size=64, sentinel=-1)


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


def nodes(graph):
    count = ctypes.c_size_t()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    assert ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    return count.value


@pytest.mark.skipif(torch.version.hip is not None, reason="nodes are counted through the CUDA driver")
@pytest.mark.parametrize(("num_tokens", "launches"), [(1, 1), (16, 1), (128, 1), (129, 2), (4096, 2)])
def test_launches(num_tokens, launches, cuda):
    """At most 1024 slots: one launch writes ids, weights and every structure; then routing's and permute's two."""
    logits = make_logits("normal", num_tokens, 128, device=cuda)
    graph, routing = captured(lambda: turnout.route(logits, GEMMA4, CONTRACT))
    assert nodes(graph) == (1 if launches == 1 else 3)
    ids, weights = routing.topk_ids, routing.topk_weights
    graph, _ = captured(lambda: turnout.permute(ids, 128, CONTRACT, topk_weights=weights))
    assert nodes(graph) == launches


@pytest.mark.parametrize("num_tokens", [16, 300])
def test_a_replay_orders_the_new_slots(num_tokens, cuda):
    logits = make_logits("normal", num_tokens, 128, device=cuda)
    graph, routing = captured(lambda: turnout.route(logits, GEMMA4, CONTRACT))
    logits.copy_(make_logits("bit_patterns", num_tokens, 128, device=cuda))
    graph.replay()
    assert_matches_oracle(routing, logits, GEMMA4, CONTRACT)
    assert_permutation_matches(routing, routing.topk_ids, 128, CONTRACT, routing.topk_weights)


@pytest.mark.parametrize("num_tokens", [16, 300])
def test_no_synchronisation(num_tokens, cuda):
    logits = make_logits("normal", num_tokens, 128, device=cuda)
    turnout.route(logits, GEMMA4, CONTRACT)
    torch.cuda.set_sync_debug_mode("error")
    try:
        turnout.route(logits, GEMMA4, CONTRACT)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["uniform", "skewed", "one_hot", "few", "sentinels", "idle"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(1, 128, 8), (16, 128, 8), (128, 128, 8), (1024, 32, 1), (170, 60, 6), (257, 128, 8), (4096, 128, 8),
     (20001, 36, 3), (2000, 1024, 2)],
)  # fmt: skip
def test_many_slots(num_tokens, num_experts, top_k, kind, gpu):
    """Sizes on both sides of those at which the number of launches, programs or tiles changes."""
    ids = make_ids(kind, num_tokens, num_experts, top_k, device=gpu)
    weights = torch.rand(num_tokens, top_k, device=gpu)
    for _ in range(2):  # the second call finds the kernels compiled
        permutation = turnout.permute(ids, num_experts, CONTRACT, topk_weights=weights)
        assert_permutation_matches(permutation, ids, num_experts, CONTRACT, weights)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(1, 128, 8), (16, 128, 8), (128, 128, 8), (1024, 128, 1), (64, 896, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_launch_routes_and_orders(num_tokens, num_experts, top_k, dtype, gpu):
    spec = turnout.RouterSpec(num_experts=num_experts, top_k=top_k, renormalize=True)
    for name in ("normal", "quantised", "bit_patterns"):
        logits = make_logits(name, num_tokens, num_experts, dtype, gpu)
        for _ in range(2):
            routing = turnout.route(logits, spec, CONTRACT)
            assert_matches_oracle(routing, logits, spec, CONTRACT)
            assert_permutation_matches(routing, routing.topk_ids, num_experts, CONTRACT, routing.topk_weights)


def test_rows_far_apart(gpu):
    """A stride beyond 2^31 elements, after calls with short ones."""
    memory = torch.zeros(2**31 + 256, dtype=torch.bfloat16, device=gpu)
    near = memory[:256].view(2, 128)
    near[1, 7] = 1
    contract = turnout.Contract(structures=("permuted_idx",))
    turnout.route(near, GEMMA4, contract)
    far = memory.as_strided((2, 128), (2**31 + 128, 1))
    far[1] = near[1]
    assert turnout.route(far, GEMMA4, contract).topk_ids[1, 0] == 7


def test_implementations_of_other_devices_are_refused(gpu):
    ids = make_ids("uniform", 3, 8, 2, device=gpu)
    contract = turnout.Contract(structures=("permuted_idx",))
    with pytest.raises(ValueError, match=r"impl='cpu' needs ids on a CPU, got .*use impl='triton' or impl='auto'"):
        turnout.permute(ids, 8, contract, impl="cpu")
    with pytest.raises(ValueError, match="impl='triton' needs ids on a GPU, got a CPU tensor; use impl='cpu'"):
        turnout.permute(ids.cpu(), 8, contract, impl="triton")
