"""Combine against an oracle in float64, within one rounding of the exact sum's neighbourhood in float32."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import turnout
from turnout.contracts import WEIGHTS_DTYPES
from turnout.testing.inputs import poisoned_buffer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAN = float("nan")


def drawn(num_tokens, top_k, hidden_size, dtype, weights_dtype=torch.float32, seed=0):
    """expert_out [T, K, H] and topk_weights [T, K] on the CPU."""
    rng = torch.Generator().manual_seed(seed)
    expert_out = torch.randn(num_tokens, top_k, hidden_size, generator=rng).to(dtype)
    return expert_out, (torch.rand(num_tokens, top_k, generator=rng) + 0.05).to(weights_dtype)


def float64(tensor):
    return tensor.cpu().double().numpy()


def assert_right(out, terms):
    """``out`` [T, H] is the rounding of a float32 sum of the exact terms [T, K, H]: K products, K - 1 additions."""
    slack = terms.shape[1] * np.abs(terms).sum(axis=1) * torch.finfo(torch.float32).eps
    exact = terms.sum(axis=1)
    lowest, highest = (float64(torch.from_numpy(bound).to(out.dtype)) for bound in (exact - slack, exact + slack))
    got = float64(out)
    wrong = ~((lowest <= got) & (got <= highest))
    assert not wrong.any(), f"got {got[wrong][:5]}, want {exact[wrong][:5]}"


def combined(expert_out, topk_weights, index, impl):
    """``turnout.combine`` into a poisoned buffer between guards."""
    shape = (topk_weights.shape[0], expert_out.shape[-1])
    buffer = poisoned_buffer(shape, expert_out.dtype, expert_out.device, 0xFF)
    out = turnout.combine(expert_out, topk_weights, index, out=buffer.tensor, impl=impl)
    assert out is buffer.tensor
    assert buffer.guards_hold(), "written outside of the buffer"
    again = turnout.combine(expert_out, topk_weights, index, impl=impl)
    torch.testing.assert_close(again, out, rtol=0, atol=0, equal_nan=True)
    return out


@EACH_DTYPE
@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 2, 40), (2, 8, 130), (4, 5, 1100)], ids=str)
def test_slots_in_order(sizes, weights_dtype, dtype, impl, device):
    expert_out, topk_weights = drawn(*sizes, dtype, weights_dtype)
    terms = float64(expert_out) * float64(topk_weights)[..., None]
    rows = expert_out.flatten(0, 1)
    out = combined(rows.to(device), topk_weights.to(device), None, impl)
    assert_right(out, terms)
    assert torch.equal(combined(expert_out.to(device), topk_weights.to(device), None, impl), out)


@EACH_DTYPE
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_slots_in_another_order(index_dtype, dtype, impl, device):
    """With rows to spare, which hold NaN; some slots have none."""
    expert_out, topk_weights = drawn(5, 3, 33, dtype)
    index = torch.randperm(15, generator=torch.Generator().manual_seed(1)).view(5, 3) + 4
    rows = torch.full((23, 33), NAN, dtype=dtype)
    rows[index.flatten()] = expert_out.flatten(0, 1)
    index[1, 2], index[4] = -1, -1
    terms = float64(expert_out) * float64(topk_weights * (index >= 0))[..., None]
    out = combined(rows.to(device), topk_weights.to(device), index.to(device, index_dtype), impl)
    assert_right(out, terms)
    assert (out[4] == 0).all()


@EACH_DTYPE
@pytest.mark.parametrize("weight", [0.0, -0.0])
def test_slots_of_weight_0_are_not_seen(weight, dtype, impl, device):
    expert_out, topk_weights = drawn(4, 3, 20, dtype)
    topk_weights[1, 0], topk_weights[3] = weight, weight
    terms = float64(expert_out) * float64(topk_weights)[..., None]
    expert_out[1, 0], expert_out[3, 1], expert_out[3, 2] = NAN, float("inf"), -float("inf")
    out = combined(expert_out.to(device), topk_weights.to(device), None, impl)
    assert_right(out, terms)
    assert (out[3] == 0).all()


@EACH_DTYPE
def test_nan_and_infinities_show(dtype, impl, device):
    """Also the NaN whose bits are all set, which rounding on the bits would turn into a zero."""
    expert_out, topk_weights = (tensor.to(device) for tensor in drawn(2, 2, 8, dtype))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    expert_out[0, 0, :4] = torch.full((4,), -1, dtype=bits, device=device).view(dtype)
    expert_out[1, 0, 0], expert_out[1, 1, 1] = float("inf"), -float("inf")
    out = combined(expert_out, topk_weights, None, impl)
    assert out[0, :4].isnan().all()
    assert out[0, 4:].isfinite().all()
    assert out[1, :2].tolist() == [float("inf"), -float("inf")]


def test_the_sum_is_in_float32_and_in_order(impl, device):
    """2^24 + 1 + 1 is 2^24 in this order, and 2^24 + 2 in the other: both bits are stated, not left to chance."""
    for values, want in (([2.0**24, 1.0, 1.0], 2.0**24), ([1.0, 1.0, 2.0**24], 2.0**24 + 2)):
        rows = torch.tensor(values, device=device)[:, None]
        assert combined(rows, torch.ones(1, 3, device=device), None, impl).item() == want


@EACH_DTYPE
def test_rows_apart(dtype, impl, device):
    expert_out, topk_weights = (tensor.to(device) for tensor in drawn(4, 2, 24, dtype))
    rows = expert_out.flatten(0, 1)
    apart = torch.cat([rows, rows * NAN], dim=1)[:, :24]
    assert torch.equal(combined(apart, topk_weights, None, impl), combined(rows, topk_weights, None, impl))


@pytest.mark.parametrize("sizes", [(0, 2, 8), (3, 0, 8), (2, 2, 0), (0, 0, 0)], ids=str)
def test_empty(sizes, impl, device):
    num_tokens, top_k, hidden_size = sizes
    rows = torch.empty(num_tokens * top_k, hidden_size, device=device)
    out = combined(rows, torch.ones(num_tokens, top_k, device=device), None, impl)
    assert torch.equal(out, torch.zeros(num_tokens, hidden_size, device=device))


def test_no_row_at_all(impl, device):
    """Every slot is skipped: there may be nothing to point at."""
    index = torch.full((3, 2), -1, dtype=torch.int32, device=device)
    out = combined(torch.empty(0, 8, device=device), torch.ones(3, 2, device=device), index, impl)
    assert torch.equal(out, torch.zeros(3, 8, device=device))


@EACH_DTYPE
def test_a_row_does_not_depend_on_its_batch(dtype, impl, device):
    expert_out, topk_weights = (tensor.to(device) for tensor in drawn(40, 3, 72, dtype))
    whole = combined(expert_out, topk_weights, None, impl)
    for start, end in ((0, 1), (5, 22), (39, 40)):
        part = combined(expert_out[start:end], topk_weights[start:end], None, impl)
        assert torch.equal(part, whole[start:end])


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_order_of_rows_does_not_matter(impl, device, data):
    """Bitwise: an index finds each slot's row wherever it lies."""
    num_tokens, top_k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    expert_out, topk_weights = (t.to(device) for t in drawn(num_tokens, top_k, 9, data.draw(st.sampled_from(DTYPES))))
    order = torch.tensor(data.draw(st.permutations(range(num_tokens * top_k))), device=device)
    index = order.argsort().view(num_tokens, top_k)
    rows = expert_out.flatten(0, 1)
    assert torch.equal(combined(rows[order], topk_weights, index, impl), combined(rows, topk_weights, None, impl))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_of_the_cpu_do_not_matter(threads, monkeypatch):
    from turnout.combine import cpu

    expert_out, topk_weights = drawn(19, 3, 40, torch.bfloat16)
    want = turnout.combine(expert_out, topk_weights, impl="cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu, "NUMBERS_PER_THREAD", 1)
    assert torch.equal(turnout.combine(expert_out, topk_weights, impl="cpu"), want)


@pytest.mark.gpu
def test_addresses_beyond_32_bits(gpu):
    """The last rows of 4.4 GB: their offsets, in elements, pass 2^31."""
    rows = torch.zeros(2**31 // 2816 + 64, 2816, dtype=torch.bfloat16, device=gpu)
    rows[-4:] = torch.arange(4.0, device=gpu)[:, None] + 1
    index = torch.arange(4, device=gpu).view(2, 2) + (len(rows) - 4)
    out = turnout.combine(rows, torch.ones(2, 2, device=gpu), index)
    assert torch.equal(out[:, 0].cpu(), torch.tensor([3.0, 7.0]).bfloat16())
