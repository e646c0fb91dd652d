"""Any router that a spec can say, on any bit pattern: hypothesis draws both."""

import dataclasses

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings

import turnout
from turnout.testing.checks import assert_bitwise_equal
from turnout.testing.inputs import every_kind_of_row

CONTRACT = turnout.Contract(ids_dtype=torch.int64, sentinel=-1)
PHYSICAL = dataclasses.replace(CONTRACT, id_space="physical")
SCORES = [  # scoring_func, selected_score, whether the sum may divide
    ("softmax", "none", True), ("sigmoid", "none", True), ("sqrtsoftplus", "none", True), ("sigmoid", "softmax", True),
    ("none", "softmax", True), ("none", "sigmoid", True), ("none", "none", False),
]  # fmt: skip


@st.composite
def specs(draw):
    """A router; the sizes are few, for on a GPU each is a compilation."""
    scoring_func, selected_score, may_renormalize = draw(st.sampled_from(SCORES))
    num_groups, topk_group = draw(st.sampled_from([(1, 1), (1, 1), (4, 2), (8, 4)]))
    num_experts = draw(st.sampled_from([24, 64] if num_groups > 1 else [7, 24, 60]))
    top_k = draw(st.sampled_from([1, 4, 6]))
    how = draw(st.sampled_from(["plain", "biased", "hashed"]))
    return turnout.RouterSpec(
        num_experts=num_experts,
        top_k=min(top_k, num_experts // num_groups * topk_group),
        logit_scale=draw(st.sampled_from([1.0, 1.0, 0.177])),
        logit_softcap=draw(st.sampled_from([None, None, 30.0])),
        scoring_func=scoring_func,
        score_dtype=draw(st.sampled_from(["float32", "input"])),
        e_score_correction_bias=how == "biased",
        num_expert_group=num_groups,
        topk_group=topk_group,
        group_score=draw(st.sampled_from(["max", "top2_sum"])),
        group_fill=draw(st.sampled_from(["-inf", "zero"])),
        hash_routing=how == "hashed",
        sorted=draw(st.booleans()),
        selected_score=selected_score,
        renormalize=may_renormalize and draw(st.booleans()),
        renormalize_eps=draw(st.sampled_from([0.0, 1e-20, 1e-6])),
        renormalize_min=draw(st.sampled_from([0.0, 1e-12])),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        per_expert_scale=draw(st.booleans()),
        divide_by_top_k=draw(st.booleans()),
        weights_rounding=draw(st.sampled_from(["none", "input"])),
    )


def inputs_of(spec, num_tokens, rng, bias_size, is_forced):
    """What the spec names, and tables in which some entries are no expert and some tokens have no row."""
    ids = torch.randint(-1, spec.num_experts + 1, (50, spec.top_k), generator=rng)
    bias = bias_size * torch.randn(spec.num_experts, generator=rng)
    return {
        "e_score_correction_bias": bias if spec.e_score_correction_bias else None,
        "per_expert_scale": torch.linspace(0.25, 2, spec.num_experts) if spec.per_expert_scale else None,
        "tid2eid": ids if spec.hash_routing else None,
        "input_ids": torch.randint(-2, 53, (num_tokens,), generator=rng) if spec.hash_routing else None,
        "forced_ids": ids[:num_tokens].short() if is_forced and not spec.hash_routing else None,
        "is_padding": torch.rand(num_tokens, generator=rng) < 0.2,
    }


def replicas_of(num_experts):
    """Two replicas of each even expert, one of each odd, in another order than the experts."""
    count = 2 - torch.arange(num_experts) % 2
    to_physical = torch.stack([torch.arange(num_experts).flip(0), num_experts + torch.arange(num_experts)], dim=1)
    return {"logical_to_physical_map": to_physical, "logical_replica_count": count}


def on(device, tensors):
    return turnout.RoutingInputs(**{k: None if tensor is None else tensor.to(device) for k, tensor in tensors.items()})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_spec_gives_a_valid_routing_of_any_bits(device, routed, impl, data):
    """The fixture ``routed`` asserts the rules, the oracle's bounds and the reference's ids."""
    spec, dtype = data.draw(specs()), data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = data.draw(st.integers(0, 2**32), "seed")
    logits = every_kind_of_row(spec.num_experts, dtype, device)
    logits[-6:] = bits_of(logits[-6:], seed)
    rng = torch.Generator().manual_seed(seed)
    is_forced = data.draw(st.sampled_from([False, False, True]), "is_forced")
    tensors = inputs_of(spec, len(logits), rng, data.draw(st.sampled_from([0.0, 0.1, 20.0]), "bias"), is_forced)
    whole = routed(logits, spec, CONTRACT, on(device, tensors))
    row = data.draw(st.integers(0, len(logits) - 1), "row")  # of a batch of one: the same bits
    of_rows = {name: tensors[name] for name in ("input_ids", "forced_ids", "is_padding") if tensors[name] is not None}
    alone = on(device, {**tensors, **{name: tensor[row : row + 1] for name, tensor in of_rows.items()}})
    assert_bitwise_equal(
        turnout.route(logits[row : row + 1], spec, CONTRACT, alone, impl=impl),
        turnout.Routing(*(tensor[row : row + 1] for tensor in whole[:2])),
    )


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_spec_gives_physical_ids_and_their_load(device, routed, data):
    spec = data.draw(specs())
    logits = every_kind_of_row(spec.num_experts, device=device)
    shape, rng = (len(logits), spec.top_k), torch.Generator().manual_seed(data.draw(st.integers(0, 2**32), "seed"))
    tensors = {
        **inputs_of(spec, len(logits), rng, 0.1, False),
        **replicas_of(spec.num_experts),
        "expert_load": torch.full((2 * spec.num_experts,), 7, dtype=torch.int32),
        "num_counted_tokens": torch.tensor([data.draw(st.sampled_from([0, 9, 99]), "counted")], dtype=torch.int32),
        "replay_ids": torch.full(shape, 0x5A5A, dtype=torch.int16) if data.draw(st.booleans(), "is_replayed") else None,
    }
    routed(logits, spec, PHYSICAL, on(device, tensors))


def bits_of(like, seed):
    """Values of any bits."""
    integer = torch.int32 if like.dtype == torch.float32 else torch.int16
    limits, rng = torch.iinfo(integer), torch.Generator().manual_seed(seed)
    return (
        torch.randint(limits.min, limits.max + 1, like.shape, generator=rng)
        .to(integer)
        .view(like.dtype)
        .to(like.device)
    )
