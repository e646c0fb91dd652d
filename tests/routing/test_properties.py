"""Any bit pattern is a legal logit: hypothesis draws the bits, many rows at a time."""

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import turnout

# Bits that a uniform draw hits seldom: both zeros, a subnormal, the largest number, infinities, NaNs, ones.
SPECIAL_BITS = {
    torch.float32: (0, -(1 << 31), 1, 0x7F7FFFFF, 0x7F800000, -0x800000, 0x7FC00000, -1, 0x3F800000, -0x40800000),
    torch.bfloat16: (0, -(1 << 15), 1, 0x7F7F, 0x7F80, -0x80, 0x7FC0, -1, 0x3F80, -0x4080),
    torch.float16: (0, -(1 << 15), 1, 0x7BFF, 0x7C00, -0x400, 0x7E00, -1, 0x3C00, -0x4400),
}
FORMS = ((torch.int64, torch.float32), (torch.int16, torch.bfloat16))


def logits_of_any_bits(dtype):
    """[T, E] logits of arbitrary bits, special ones among them."""
    integer = np.dtype(np.int32 if dtype == torch.float32 else np.int16)
    limits = np.iinfo(integer)
    bits = st.sampled_from(SPECIAL_BITS[dtype]) | st.integers(int(limits.min), int(limits.max))
    shape = st.tuples(st.integers(1, 16), st.sampled_from((1, 3, 17, 60)))
    drawn = shape.flatmap(lambda shape: arrays.arrays(integer, shape, elements=bits))
    return drawn.map(lambda array: torch.from_numpy(array).view(dtype))


@pytest.mark.parametrize("dtype", SPECIAL_BITS, ids=str)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the fixtures keep no state
@given(data=st.data())
def test_any_bits_give_a_valid_routing(dtype, device, routed, data):
    """Ids equal the oracle's, and weights lie within a rounding of its: the fixture ``routed`` asserts it."""
    logits = data.draw(logits_of_any_bits(dtype)).to(device)
    num_experts = logits.shape[1]
    spec = turnout.RouterSpec(
        num_experts=num_experts,
        top_k=data.draw(st.sampled_from((1, min(num_experts, 6))), "top_k"),
        renormalize=data.draw(st.booleans(), "renormalize"),
    )
    # Few variants, for on a GPU each is a compilation; test_grid.py has them all.
    ids_dtype, weights_dtype = data.draw(st.sampled_from(FORMS), "form")
    routed(logits, spec, turnout.Contract(ids_dtype=ids_dtype, weights_dtype=weights_dtype))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_renaming_experts_renames_the_ids(device, impl, data):
    """Without ties, a permutation of the experts permutes the ids and leaves the weights as they are."""
    num_experts = data.draw(st.sampled_from((5, 16, 60)))
    order = torch.tensor(data.draw(st.permutations(range(num_experts))))
    values = torch.linspace(-3, 4, num_experts)[torch.randperm(num_experts, generator=torch.Generator().manual_seed(1))]
    spec = turnout.RouterSpec(num_experts=num_experts, top_k=4, renormalize=True)
    contract = turnout.Contract(ids_dtype=torch.int64)
    plain = turnout.route(values[None].to(device), spec, contract, impl=impl)
    renamed = turnout.route(values[None, order].to(device), spec, contract, impl=impl)
    assert torch.equal(order.to(device)[renamed.topk_ids], plain.topk_ids)
    assert torch.equal(renamed.topk_weights, plain.topk_weights)
