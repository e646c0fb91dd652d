"""`turnout.experts` on quantised weights: results, whatever the routing, and what must not show in them."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from quantized_cases import NUM_TOKENS, ROUTINGS, SCHEME_IDS, SCHEMES, Sizes, check_errors, draw, expected

import turnout
from turnout.contracts import IDS_DTYPES

EACH_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=SCHEME_IDS)
EACH_KERNEL = pytest.mark.parametrize("impl", ["triton", "grouped"])
# In Triton's interpreter, where every operation takes a while. Columns come in several steps, of several groups, and
# the last step of 8-bit weights is not whole.
FEW = Sizes(num_experts=4, top_k=2, hidden_size=192, intermediate_size=64)


def sizes_for(scheme):
    return FEW._replace(hidden_size=128, intermediate_size=128) if scheme[1] == 128 else FEW


def run(case, impl, **options):
    return turnout.experts(*case, impl=impl, **options)


@pytest.mark.parametrize("routing", ROUTINGS)
@EACH_SCHEME
def test_errors_on_a_cpu(scheme, routing):
    for num_tokens in NUM_TOKENS:
        case = draw(scheme, num_tokens, routing=routing)
        check_errors(case, {impl: run(case, impl) for impl in ("reference", "cpu")})


@pytest.mark.parametrize(("impl", "num_tokens"), [("triton", 0), ("triton", 3), ("grouped", 1), ("grouped", 20)])
@EACH_SCHEME
def test_errors_of_kernels(impl, scheme, num_tokens, kernel_device):
    """float16, since the interpreter gets products of bfloat16 wrong."""
    case = draw(scheme, num_tokens, sizes_for(scheme), dtype=torch.float16, device=kernel_device)
    check_errors(case, {impl: run(case, impl)})


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTINGS)
@EACH_SCHEME
@EACH_KERNEL
def test_errors_on_a_gpu(impl, scheme, routing, gpu):
    for num_tokens in NUM_TOKENS:
        for dtype in (torch.bfloat16, torch.float16):
            case = draw(scheme, num_tokens, routing=routing, dtype=dtype, device=gpu)
            check_errors(case, {impl: run(case, impl)})


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton", "grouped"])
def test_float32(impl, kernel_device):
    """Of int4 alone: a quantised activation that rounds the other way weighs more than float32 does."""
    device = kernel_device if impl in ("triton", "grouped") else "cpu"
    case = draw(("w4a16", 32), 5, FEW, dtype=torch.float32, device=device)
    assert (run(case, impl).double() - expected(case)).norm() <= 1e-6 * expected(case).norm()


@EACH_SCHEME
@pytest.mark.parametrize("top_k", [1, 4])
def test_one_expert_and_all(top_k, scheme, kernel_device):
    """K = 1 and K = E."""
    case = draw(scheme, 3, sizes_for(scheme)._replace(top_k=top_k), dtype=torch.float16)
    check_errors(case, {impl: run(case, impl) for impl in ("reference", "cpu")})
    if scheme[0] in ("w4a16", "w8a8_fp8"):  # the interpreter takes its time
        case = draw(scheme, 2, sizes_for(scheme)._replace(top_k=top_k), dtype=torch.float16, device=kernel_device)
        check_errors(case, {"grouped": run(case, "grouped")})


@pytest.mark.parametrize("ids_dtype", IDS_DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton", "grouped"])
def test_slots_without_an_expert(impl, ids_dtype, kernel_device):
    """Ids of any dtype; those that are no expert's are skipped, whatever lies in their token."""
    device = kernel_device if impl in ("triton", "grouped") else "cpu"
    case = draw(("w8a8_int8", None), 4, FEW, dtype=torch.float16, device=device)
    ids, weights = case.routing.topk_ids.clone(), case.routing.topk_weights.clone()
    ids[1], ids[2, 0] = FEW.num_experts, (FEW.num_experts if ids_dtype == torch.uint32 else -1)
    case.hidden_states[1] = float("nan")
    case = case._replace(routing=turnout.Routing(weights, ids.to(ids_dtype)))
    out = run(case, impl)
    assert (out[1] == 0).all()
    others = [0, 2, 3]
    rest = case._replace(
        hidden_states=case.hidden_states[others], routing=turnout.Routing(weights[others], ids[others])
    )
    check_errors(rest, {impl: out[others]})


@EACH_SCHEME
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_rows_do_not_depend_on_their_batch_on_a_cpu(impl, scheme):
    case = draw(scheme, 40)
    whole = run(case, impl, batch_invariant=True)
    for t in (0, 17, 39):
        alone = alone_of(case, t)
        assert torch.equal(run(alone, impl, batch_invariant=True)[0], whole[t])


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[4]], ids=["w4a16-32", "w8a8_fp8"])
@pytest.mark.parametrize(("impl", "batch_invariant"), [("triton", False), ("grouped", True)])
def test_rows_do_not_depend_on_their_batch(impl, batch_invariant, scheme, kernel_device):
    num_tokens = 5 if kernel_device.type == "cpu" else 1024
    case = draw(scheme, num_tokens, sizes_for(scheme), dtype=torch.float16, device=kernel_device)
    whole = run(case, impl, batch_invariant=batch_invariant)
    assert torch.equal(run(alone_of(case, 3), impl, batch_invariant=batch_invariant)[0], whole[3])


def alone_of(case, t):
    routing = turnout.Routing(*(tensor[t : t + 1] for tensor in case.routing[:2]))
    return case._replace(hidden_states=case.hidden_states[t : t + 1], routing=routing)


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from(SCHEMES), st.integers(1, 40))
@hypothesis.settings(max_examples=15)
def test_order_of_tokens_and_names_of_experts_do_not_matter(seed, scheme, num_tokens):
    """Rows follow their tokens, and experts with other ids are the same experts: bit for bit."""
    case = draw(scheme, num_tokens)
    whole = run(case, "cpu", batch_invariant=True)
    rng = torch.Generator().manual_seed(seed)
    tokens, names = torch.randperm(num_tokens, generator=rng), torch.randperm(7, generator=rng)
    weights = turnout.ExpertsWeights(*(t if t is None else t[names.argsort()].contiguous() for t in case.weights))
    routing = turnout.Routing(case.routing.topk_weights[tokens], names[case.routing.topk_ids[tokens]])
    other = case._replace(hidden_states=case.hidden_states[tokens], weights=weights, routing=routing)
    assert torch.equal(run(other, "cpu", batch_invariant=True), whole[tokens])


def test_a_row_of_nan_spoils_no_other():
    for scheme in SCHEMES:
        case = draw(scheme, 6)
        right = run(case, "cpu")
        case.hidden_states[2, 5] = float("nan")
        for impl in ("cpu", "reference"):
            out = run(case, impl, batch_invariant=True)
            assert out[2].isnan().any()
            assert torch.allclose(out[[0, 1, 3, 4, 5]], right[[0, 1, 3, 4, 5]], atol=0.05)


@pytest.mark.parametrize("block_size", [16, 32])
def test_the_block_map_of_the_routing_is_read(block_size, kernel_device):
    """A map that says something else than the ids: the result follows the map."""
    case = draw(("w4a16", 32), 4, FEW._replace(top_k=1), dtype=torch.float16, device=kernel_device)
    contract = turnout.Contract(
        structures=("sorted_token_ids", "expert_ids", "num_tokens_post_padded"), block_size=block_size
    )
    blocks = turnout.permute(torch.full_like(case.routing.topk_ids, 2), FEW.num_experts, contract)
    routing = turnout.Routing(*case.routing[:2], *blocks)
    twos = turnout.Routing(case.routing.topk_weights, torch.full_like(case.routing.topk_ids, 2))
    check_errors(case._replace(routing=twos), {"grouped": run(case._replace(routing=routing), "grouped")})


def test_a_layer_through_moe():
    """From hidden states on, with every implementation's own contract."""
    case = draw(("w8a8_int8", None), 9)
    router = turnout.RouterWeights(torch.randn(7, 160).bfloat16())
    router_spec = turnout.RouterSpec(num_experts=7, top_k=3)
    results = [
        turnout.moe(case.hidden_states, router, case.weights, router_spec, case.spec, impl=impl)
        for impl in ("reference", "cpu")
    ]
    assert results[0].abs().max() > 0
    assert torch.allclose(*results, atol=0.05)


def test_the_w4a8_contract_on_a_cpu_is_read_without_a_cast():
    """The routing launch writes the int64 that this consumer reads (on Arm CPUs, vLLM's), and the experts read that."""
    contract = next(
        turnout.contracts[name] for name in turnout.contracts if name.endswith("compressed_tensors.w4a8_int8")
    )
    assert contract.ids_dtype == torch.int64
    case = draw(("w4a8_int8", 32), 17)
    router_spec = turnout.RouterSpec(num_experts=7, top_k=3, renormalize=True)
    router_logits = torch.randn(17, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = turnout.route(router_logits, router_spec, contract)
    assert routing.topk_ids.dtype == torch.int64
    check_errors(case._replace(routing=routing), {"cpu": run(case._replace(routing=routing), "cpu")})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        run(case._replace(routing=routing), "cpu")
    copied = [event for event in profiler.events() if event.name in ("aten::copy_", "aten::_to_copy", "aten::clone")]
    assert [event for event in copied if [17, 3] in event.input_shapes or [51] in event.input_shapes] == []
