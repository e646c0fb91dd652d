"""Experts against an oracle in float64: each error at most twice that of a plain run, plus one rounding."""

import dataclasses

import pytest
import torch

from turnout.contracts import IDS_DTYPES, WEIGHTS_DTYPES
from turnout.testing.experts import NAMED_ROUTINGS, SPECS, ExpertsCase

NUM_TOKENS = (0, 1, 2, 15, 16, 17, 64, 257, 1024)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("routing", NAMED_ROUTINGS)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_any_number_of_tokens_and_any_distribution(num_tokens, routing, run, is_interpreted):
    if is_interpreted and (num_tokens > 64 or (routing != "uniform" and num_tokens not in (1, 17))):
        pytest.skip("hundreds of programs in Triton's interpreter; the same runs natively on a GPU")
    run(
        ExpertsCase(
            num_tokens=num_tokens, routing=routing, num_experts=7, top_k=2, hidden_size=24, intermediate_size=20
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_every_activation_and_layout(spec, dtype, run):
    """H and I are no multiples of any tile, E is no power of two."""
    run(ExpertsCase(num_tokens=5, num_experts=5, hidden_size=37, intermediate_size=19, spec=spec, dtype=dtype))


@pytest.mark.parametrize("spec", ["gelu_tanh", "gpt_oss"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(ExpertsCase(num_tokens=6, num_experts=5, top_k=1), id="top_k_1"),
        pytest.param(ExpertsCase(num_tokens=6, num_experts=5, top_k=5), id="top_k_all"),
        pytest.param(ExpertsCase(num_tokens=3, num_experts=1, top_k=1), id="one_expert"),
        pytest.param(ExpertsCase(num_tokens=4, num_experts=129, top_k=3), id="many_experts"),
        pytest.param(ExpertsCase(num_tokens=4, hidden_size=1, intermediate_size=1), id="sizes_of_1"),
        pytest.param(ExpertsCase(num_tokens=5, hidden_size=130, intermediate_size=67), id="sizes_past_a_tile"),
        pytest.param(ExpertsCase(num_tokens=5, hidden_size=128, intermediate_size=64), id="sizes_of_tiles"),
    ],
)
def test_sizes(case, spec, run):
    run(dataclasses.replace(case, spec=spec))


@pytest.mark.parametrize("ids_dtype", IDS_DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES, ids=str)
def test_dtypes_of_ids_and_weights(ids_dtype, weights_dtype, run):
    run(ExpertsCase(num_tokens=5, ids_dtype=ids_dtype, weights_dtype=weights_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 17, 65])
def test_sizes_of_a_small_model_in_16_bits(num_tokens, dtype, run, is_interpreted):
    if is_interpreted and num_tokens > 1:
        pytest.skip("hundreds of programs in Triton's interpreter; the same runs natively on a GPU")
    run(ExpertsCase(num_tokens=num_tokens, num_experts=16, top_k=4, hidden_size=256, intermediate_size=96, dtype=dtype))


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_large_values_keep_the_activation_finite(num_tokens, run, device):
    """Gates of several hundred, on both sides of zero: exponentials overflow, their shares do not."""
    for spec in ("silu", "gelu", "gelu_tanh"):
        inputs = ExpertsCase(num_tokens=num_tokens, spec=spec).make(device)
        run.inputs(dataclasses.replace(inputs, hidden_states=inputs.hidden_states * 200))


def test_strided_hidden_states(run, device):
    inputs = ExpertsCase(num_tokens=5).make(device)
    apart = torch.cat([inputs.hidden_states, inputs.hidden_states.flip(1)], dim=1)[:, : inputs.hidden_states.shape[1]]
    every_second = inputs.hidden_states.repeat_interleave(2, dim=0)[::2]
    want = run.inputs(inputs)
    for hidden_states in (apart, every_second):
        assert torch.equal(run.inputs(dataclasses.replace(inputs, hidden_states=hidden_states)), want)
