"""The CPU kernel's scores have the bits of the reference's: those of every 16-bit logit, and of any float32 one.

All experts of a row are selected, so that each score is seen. What is not held here are the shares of a softmax that
ranks logits: they decide no selection, and take the exp of the machine, within ``WEIGHTS_TOLERANCE``.
"""

import dataclasses

import pytest
import torch

import turnout

NUM_TOKENS, NUM_EXPERTS = 4096, 16
CONTRACT = turnout.Contract(ids_dtype=torch.int64)
BIAS = torch.linspace(-0.3, 0.3, NUM_EXPERTS)
FIELDS = {
    "sigmoid": {"scoring_func": "sigmoid"},
    "sqrtsoftplus": {"scoring_func": "sqrtsoftplus"},
    "softmax": {"scoring_func": "softmax", "e_score_correction_bias": True},
    "softcap": {"scoring_func": "none", "logit_scale": 0.177, "logit_softcap": 30.0},
    "sigmoid_of_softcap": {"scoring_func": "sigmoid", "logit_softcap": 2.0},
    "softmax_of_softcap": {"scoring_func": "softmax", "logit_softcap": 30.0, "e_score_correction_bias": True},
    "sigmoid_of_selected": {"scoring_func": "none", "selected_score": "sigmoid"},
}
SPECS = {name: turnout.RouterSpec(num_experts=NUM_EXPERTS, top_k=NUM_EXPERTS, **f) for name, f in FIELDS.items()}
EACH_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def logits_of(kind, dtype):
    rng = torch.Generator().manual_seed(0)
    size = NUM_TOKENS * NUM_EXPERTS
    if kind == "usual":
        logits = (torch.randn(size, generator=rng) * 20).to(dtype)
    elif dtype == torch.float32:
        logits = torch.randint(-(2**31), 2**31, (size,), generator=rng).to(torch.int32).view(dtype)
    else:  # each pattern once
        logits = torch.randperm(2**16, generator=rng).sub(2**15).to(torch.int16).view(dtype)
    return logits.view(NUM_TOKENS, NUM_EXPERTS)


def assert_bits_of_the_reference(logits, spec):
    inputs = turnout.RoutingInputs(e_score_correction_bias=BIAS if spec.e_score_correction_bias else None)
    got, want = (turnout.route(logits, spec, CONTRACT, inputs, impl=impl) for impl in ("cpu", "reference"))
    assert want.topk_weights.unique().numel() > NUM_EXPERTS
    assert torch.equal(got.topk_ids, want.topk_ids)
    wrong = got.topk_weights.view(torch.int32) != want.topk_weights.view(torch.int32)
    chosen = logits.gather(1, want.topk_ids)
    assert not wrong.any(), f"{int(wrong.sum())} weights, the first of logits {chosen[wrong][:3].tolist()}"


@EACH_SPEC
@EACH_DTYPE
@pytest.mark.parametrize("kind", ["usual", "any_bits"])
def test_scores(spec, dtype, kind):
    assert_bits_of_the_reference(logits_of(kind, dtype), spec)


@EACH_SPEC
@EACH_DTYPE
def test_scores_and_weights_that_the_model_rounds(spec, dtype):
    spec = dataclasses.replace(spec, routed_scaling_factor=2.5, weights_rounding="input", score_dtype="input")
    assert_bits_of_the_reference(logits_of("any_bits", dtype), spec)


@EACH_DTYPE
@pytest.mark.parametrize("name", ["sigmoid", "sqrtsoftplus", "softmax"])
def test_scores_that_choose_and_are_normalised(name, dtype):
    spec = dataclasses.replace(
        SPECS[name], top_k=5, num_expert_group=4, topk_group=2, group_score="top2_sum", e_score_correction_bias=True,
        renormalize=True, renormalize_eps=1e-20,
    )  # fmt: skip
    for kind in ("usual", "any_bits"):
        assert_bits_of_the_reference(logits_of(kind, dtype), spec)
