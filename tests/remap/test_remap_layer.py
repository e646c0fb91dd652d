"""The path from ids to a layer's output, under the consumer's names, against float64 and against turnout.experts."""

import dataclasses

import pytest
import torch
from remap_cases import ROUTINGS, make_ids, make_map

import turnout
from turnout.integrations.vllm_xpu_kernels import XpuFusedMoe, moe_gather, remap_hidden_states
from turnout.remap.api import remap_hidden_states as remap
from turnout.remap.api import remapped_experts

SIZES = [0, 1, 2, 15, 16, 17, 64, 257, 1024]
HIDDEN, INTERMEDIATE, EXPERTS = 40, 24, 7  # none of them a multiple of a tile
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make_layer(activation, dtype=torch.float32, device="cpu", num_experts=EXPERTS, **changed):
    """A layer in the consumer's layout: w13 [E, H, 2I], w2 [E, I, H], biases where gpt-oss has them."""
    rng = torch.Generator().manual_seed(7)
    has_bias = activation == "swigluoai"

    def drawn(*shape, fan=1):
        return (torch.randn(*shape, generator=rng) / fan**0.5).to(dtype).to(device)

    fields = {
        "w13": drawn(num_experts, HIDDEN, 2 * INTERMEDIATE, fan=HIDDEN), "w13_scales": None,
        "w13_bias": drawn(num_experts, 2 * INTERMEDIATE) if has_bias else None,
        "w2": drawn(num_experts, INTERMEDIATE, HIDDEN, fan=INTERMEDIATE), "w2_scales": None,
        "w2_bias": drawn(num_experts, HIDDEN) if has_bias else None,
        "n_experts_per_token": 3, "activation": activation, "num_experts": num_experts,
    }  # fmt: skip
    return XpuFusedMoe(**fields | changed)


def make_tokens(num_tokens, dtype=torch.float32, device="cpu"):
    """Hidden states [T, H] and weights [T, 3]."""
    rng = torch.Generator().manual_seed(num_tokens)
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=rng).to(dtype)
    return hidden_states.to(device), torch.rand(num_tokens, 3, generator=rng).to(device)


def local_ids(topk_ids, expert_map, num_experts=EXPERTS):
    ids = topk_ids.cpu().long()
    if expert_map is not None:
        inside = (ids >= 0) & (ids < len(expert_map))
        ids = torch.where(inside, expert_map.cpu().long()[ids.where(inside, 0)], -1)
    return torch.where((ids >= 0) & (ids < num_experts), ids, -1)


def layer_in(dtype, layer, hidden_states, topk_weights, ids):
    """The layer by the rules, every operation in one dtype, expert by expert; ids are this rank's, or -1."""
    x, weights = hidden_states.cpu().to(dtype), topk_weights.cpu().to(dtype)
    out = torch.zeros_like(x)
    for expert in range(layer.num_experts):
        token, k = (ids == expert).nonzero(as_tuple=True)
        gate_up = x[token] @ layer.w13[expert].cpu().to(dtype)
        if layer.w13_bias is not None:
            gate_up = gate_up + layer.w13_bias[expert].cpu().to(dtype)
        if layer.activation == "swigluoai":
            gate, up = gate_up[:, ::2].clamp(max=7.0), gate_up[:, 1::2].clamp(-7.0, 7.0)
            values = (up + 1) * (gate * torch.sigmoid(1.702 * gate))
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            if layer.gemm1_clamp_limit:
                limit = layer.gemm1_clamp_limit
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            functions = {
                "silu": torch.nn.functional.silu,
                "gelu": torch.nn.functional.gelu,
                "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
            }
            values = functions[layer.activation](gate) * up
        outputs = values @ layer.w2[expert].cpu().to(dtype)
        if layer.w2_bias is not None:
            outputs = outputs + layer.w2_bias[expert].cpu().to(dtype)
        out.index_add_(0, token, outputs * weights[token, k][:, None])
    return out


def assert_close_enough(out, layer, hidden_states, topk_weights, ids):
    """The error against float64 is at most twice that of a plain run in the dtype of the hidden states."""
    want = layer_in(torch.float64, layer, hidden_states, topk_weights, ids)
    plain = layer_in(hidden_states.dtype, layer, hidden_states, topk_weights, ids)
    if want.numel() == 0:
        assert out.shape == want.shape
        return
    allowed = 2 * (plain.double() - want).abs().max() + torch.finfo(torch.float32).eps
    assert (out.cpu().double() - want).abs().max() <= allowed


def run(layer, hidden_states, topk_weights, topk_ids, expert_map, impl):
    """``layer.apply`` on buffers full of NaN: what is read without having been written shows."""
    output = torch.full_like(hidden_states, torch.nan)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        if hidden_states.is_cpu and impl == "triton" and len(hidden_states) > 16:  # the GEMMs alone: the rest is slow
            expert_map = layer.expert_map if expert_map is None else expert_map
            remapped = remap(hidden_states, topk_ids, layer.num_experts, expert_map=expert_map, impl="cpu")
            weights = turnout.ExpertsWeights(layer.w13, layer.w2, layer.w13_bias, layer.w2_bias)
            outputs = remapped_experts(*remapped[:2], weights, layer._spec, impl=impl)
            turnout.combine(outputs, topk_weights, remapped.inv_permuted_idx, out=output, impl="cpu")
        else:
            layer.apply(output, hidden_states, topk_weights, topk_ids, expert_map, impl=impl)
    finally:
        torch.use_deterministic_algorithms(False)
    return output


@pytest.fixture(params=FLOATS, ids=str)
def dtype(request, impl, kernel_device):
    if impl == "triton" and kernel_device.type == "cpu" and request.param == torch.bfloat16:
        pytest.skip("Triton's interpreter gets products of bfloat16 wrong: this runs on a GPU")
    return request.param


@pytest.mark.parametrize("kind", ROUTINGS)
def test_any_number_of_tokens(kind, dtype, impl, device):
    """Activations, both dtypes of ids, a map and none take turns over sizes and kinds."""
    is_interpreted = impl == "triton" and device.type == "cpu"
    sizes = SIZES[:7] if is_interpreted and dtype == torch.float16 else SIZES  # there, numpy multiplies float16 slowly
    for index, num_tokens in enumerate(sizes, start=ROUTINGS.index(kind)):
        layer = make_layer(ACTIVATIONS[index % 4], dtype, device)
        ids_dtype, with_map = (torch.int64, torch.int32)[index // 2 % 2], index // 4 % 2
        expert_map = make_map(20, EXPERTS, device) if with_map else None
        ids = make_ids(kind, num_tokens, 3, 20 if with_map else EXPERTS, ids_dtype, device, seed=index)
        hidden_states, topk_weights = make_tokens(num_tokens, dtype, device)
        out = run(layer, hidden_states, topk_weights, ids, expert_map, impl)
        assert_close_enough(out, layer, hidden_states, topk_weights, local_ids(ids, expert_map))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_map", [False, True], ids=["local_ids", "expert_map"])
def test_the_layer_is_that_of_turnout_experts(with_map, activation, impl, device):
    layer = make_layer(activation, device=device)
    expert_map = make_map(20, EXPERTS, device) if with_map else None
    ids = make_ids("uniform", 17, 3, 20 if with_map else EXPERTS, torch.int32, device)
    hidden_states, topk_weights = make_tokens(17, device=device)
    local = local_ids(ids, expert_map).to(device)
    weights = turnout.ExpertsWeights(layer.w13, layer.w2, layer.w13_bias, layer.w2_bias)
    routing = turnout.Routing(topk_weights, local)
    want = turnout.experts(hidden_states, weights, routing, layer._spec, impl="reference")
    out = run(layer, hidden_states, topk_weights, ids, expert_map, impl)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 5), (33, 1)])
def test_one_expert_of_each_token_and_all_of_them(num_experts, top_k, impl, device):
    layer = make_layer("silu", device=device, num_experts=num_experts, n_experts_per_token=top_k)
    ids = make_ids("uniform", 17, top_k, num_experts, device=device)
    hidden_states, _ = make_tokens(17, device=device)
    topk_weights = torch.rand(17, top_k, generator=torch.Generator().manual_seed(1)).to(device)
    out = run(layer, hidden_states, topk_weights, ids, None, impl)
    assert_close_enough(out, layer, hidden_states, topk_weights, ids.cpu())


def test_a_clamp_of_the_projection(impl, device):
    layer = make_layer("silu", device=device, gemm1_clamp_limit=0.25)
    hidden_states, topk_weights = make_tokens(17, device=device)
    ids = make_ids("uniform", 17, 3, EXPERTS, device=device)
    out = run(layer, hidden_states, topk_weights, ids, None, impl)
    assert_close_enough(out, layer, hidden_states, topk_weights, ids.cpu())
    unclamped = dataclasses.replace(layer, gemm1_clamp_limit=0.0)  # as there: 0 is no clamp
    assert not torch.allclose(run(unclamped, hidden_states, topk_weights, ids, None, impl), out)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_ranks_sum_to_the_whole_layer(ids_dtype, impl, device):
    """Two ranks, each with its half of the experts and the map that the object makes for itself."""
    whole = make_layer("silu", device=device, num_experts=6)
    hidden_states, topk_weights = make_tokens(17, device=device)
    ids = make_ids("uniform", 17, 3, 6, ids_dtype, device)
    parts = []
    for rank in range(2):
        mine = slice(3 * rank, 3 * rank + 3)
        changed = {"w13": whole.w13[mine], "w2": whole.w2[mine], "num_experts": 3, "ep_rank": rank, "ep_size": 2}
        layer = dataclasses.replace(whole, **changed)
        assert layer.expert_map.tolist() == [[0, 1, 2, -1, -1, -1], [-1, -1, -1, 0, 1, 2]][rank]
        parts.append(run(layer, hidden_states, topk_weights, ids, None, impl))
    out = run(whole, hidden_states, topk_weights, ids, None, impl)
    torch.testing.assert_close(parts[0] + parts[1], out, rtol=1e-5, atol=1e-5)


def test_rows_with_nothing_to_do_are_zero(impl, device):
    """Padding carries -1 in every slot; there, in vllm-xpu-kernels 0.1.16.2, such rows are zeroed beforehand."""
    layer = make_layer("silu", device=device)
    hidden_states, topk_weights = make_tokens(5, device=device)
    ids = make_ids("uniform", 5, 3, EXPERTS, device=device)
    ids[1] = ids[4] = -1
    hidden_states[1] = torch.nan
    for expert_map in (None, make_map(EXPERTS, EXPERTS, device)):
        out = run(layer, hidden_states, topk_weights, ids, expert_map, impl)
        assert not out[[1, 4]].any()
        assert out[[0, 2, 3]].isfinite().all()


def test_a_tile_ends_with_its_experts_rows(kernel_device):
    """Rows past the last expert's keep what memory held: a tile that ran on would reach into the next expert's, too."""
    pytest.importorskip("triton", reason="triton is not installed")
    layer = make_layer("silu", device=kernel_device, num_experts=3)
    rows, counts = torch.ones(9, HIDDEN, device=kernel_device), torch.tensor([2, 0, 3], dtype=torch.int32)
    weights = turnout.ExpertsWeights(layer.w13, layer.w2)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        outputs = remapped_experts(rows, counts.to(kernel_device), weights, layer._spec, impl="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert outputs[:5].isfinite().all()
    assert outputs[5:].isnan().all()


def test_the_functions_by_themselves(kernel_device):
    """The consumer's three calls, by position and by name, on buffers that nobody zeroed."""
    ids = make_ids("uniform", 6, 3, EXPERTS, torch.int32, kernel_device)
    hidden_states, topk_weights = make_tokens(6, device=kernel_device)
    rows = torch.full((18, HIDDEN), torch.nan, device=kernel_device)
    rows_per_expert = torch.full((EXPERTS,), 77, dtype=torch.int32, device=kernel_device)
    positions = torch.full((6, 3), 77, dtype=torch.int32, device=kernel_device)
    remap_hidden_states(
        hidden_states, None, rows, None, expert_map=None, rows_per_expert=rows_per_expert,
        unpermuted_row_to_permuted_row=positions, topk_ids=ids, total_experts_num=EXPERTS, local_experts_num=EXPERTS,
    )  # fmt: skip
    assert rows_per_expert.tolist() == ids.flatten().bincount(minlength=EXPERTS).tolist()
    assert torch.equal(rows[positions.long().flatten()], hidden_states.repeat_interleave(3, dim=0))
    output = torch.empty_like(hidden_states)
    moe_gather(output, rows, topk_weights, positions, EXPERTS)
    torch.testing.assert_close(output, hidden_states * topk_weights.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        (
            {"activation": "relu2_no_mul"},
            NotImplementedError,
            "'relu2_no_mul'; it runs silu, gelu, gelu_tanh, swigluoai",
        ),
        ({"w13_scales": torch.ones(7)}, NotImplementedError, "quantised weights .*; turnout.experts does"),
        ({"activation": "swigluoai", "gemm1_clamp_limit": 5.0}, ValueError, "gemm1_clamp_limit=5.0 contradicts"),
    ],
)
def test_layers_that_are_refused(changed, error, match):
    with pytest.raises(error, match=match):
        make_layer(**{"activation": "silu"} | changed)


def test_calls_that_are_refused():
    layer = make_layer("silu")
    hidden_states, topk_weights = make_tokens(5)
    ids, output = make_ids("uniform", 5, 3, EXPERTS), torch.empty(5, HIDDEN)
    with pytest.raises(NotImplementedError, match="quantised hidden states"):
        layer.apply(output, hidden_states, topk_weights, ids, a1q_scale=torch.ones(5, 1))
    with pytest.raises(ValueError, match="topk_ids has K = 2, but n_experts_per_token is 3"):
        layer.apply(output, hidden_states, topk_weights, ids[:, :2].contiguous())
    with pytest.raises(ValueError, match=r"topk_ids must be .* of torch.int32 or torch.int64, got .*int16"):
        layer.apply(output, hidden_states, topk_weights, ids.short())
    with pytest.raises(ValueError, match=r"topk_weights must be torch.float32, as moe_gather reads them, got .*16"):
        moe_gather(output, torch.zeros(15, HIDDEN), topk_weights.half(), ids.int(), EXPERTS)
    with pytest.raises(TypeError, match="local_experts_num"):
        remap_hidden_states(hidden_states, total_experts_num=7)
    with pytest.raises(ValueError, match="total_experts_num is 9, but expert_map has 7 entries"):
        remap_hidden_states(hidden_states, None, None, None, make_map(7, 7), None, None, ids, 9, 7)
