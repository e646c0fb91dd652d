"""What holds of experts whatever the numbers: no order of tokens, name of an expert or neighbour matters."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import turnout
from turnout.testing.experts import NAMED_ROUTINGS, SPECS, ExpertsCase

ANY_CASE = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def cases(draw, dtypes=(torch.float32, torch.float16)):
    num_experts = draw(st.sampled_from((1, 2, 5, 8)), "num_experts")
    return ExpertsCase(
        num_tokens=draw(st.integers(1, 5), "num_tokens"),
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(num_experts, 3)), "top_k"),
        hidden_size=draw(st.sampled_from((1, 16, 33)), "hidden_size"),
        intermediate_size=draw(st.sampled_from((1, 16, 21)), "intermediate_size"),
        spec=draw(st.sampled_from(tuple(SPECS)), "spec"),
        routing=draw(st.sampled_from(tuple(NAMED_ROUTINGS)), "routing"),
        dtype=draw(st.sampled_from(dtypes), "dtype"),
        seed=draw(st.integers(0, 99), "seed"),
    )


def experts(inputs, impl, batch_invariant=True):
    return turnout.experts(*inputs.arguments, impl=impl, batch_invariant=batch_invariant)


@ANY_CASE
@given(case=cases())
def test_any_case_is_accurate(case, run):
    run(case)


@ANY_CASE
@given(case=cases(), data=st.data())
def test_the_order_of_tokens_does_not_matter(case, data, impl, device):
    inputs = case.make(device)
    order = torch.tensor(data.draw(st.permutations(range(case.num_tokens))), device=device)
    assert torch.equal(experts(inputs.rows(order), impl), experts(inputs, impl)[order])


@ANY_CASE
@given(case=cases(), data=st.data())
def test_the_names_of_experts_do_not_matter(case, data, impl, device):
    inputs = case.make(device)
    old_of_new = torch.tensor(data.draw(st.permutations(range(case.num_experts))), device=device)
    weights = turnout.ExpertsWeights(*(None if w is None else w[old_of_new] for w in inputs.weights))
    ids = old_of_new.argsort()[inputs.routing.topk_ids.long()].to(case.ids_dtype)
    renamed = dataclasses.replace(inputs, weights=weights, routing=inputs.routing._replace(topk_ids=ids))
    assert torch.equal(experts(renamed, impl), experts(inputs, impl))


@ANY_CASE
@given(case=cases(), data=st.data())
def test_a_row_does_not_depend_on_its_batch(case, data, impl, device):
    inputs = case.make(device)
    whole = experts(inputs, impl)
    start = data.draw(st.integers(0, case.num_tokens - 1), "start")
    end = data.draw(st.integers(start + 1, case.num_tokens), "end")
    assert torch.equal(experts(inputs.rows(slice(start, end)), impl), whole[start:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", ["gelu_tanh", "gpt_oss"])
def test_a_row_does_not_depend_on_many_others(spec, dtype, impl, device, is_interpreted):
    """From 1 token to 300: other kernels, other blocks, other threads."""
    if is_interpreted:
        pytest.skip("thousands of programs in Triton's interpreter; the same runs natively on a GPU")
    case = ExpertsCase(num_tokens=300, hidden_size=96, intermediate_size=64, spec=spec, dtype=dtype, routing="skewed")
    inputs = case.make(device)
    whole = experts(inputs, impl)
    for start, end in ((0, 1), (7, 24), (40, 260)):
        assert torch.equal(experts(inputs.rows(slice(start, end)), impl), whole[start:end])


def test_runs_give_the_same_bits(impl, modes, device):
    inputs = ExpertsCase(num_tokens=9, routing="one_hot_expert").make(device)
    for batch_invariant in modes:
        first = experts(inputs, impl, batch_invariant)
        assert all(torch.equal(experts(inputs, impl, batch_invariant), first) for _ in range(2))
