"""Every size and dtype against the oracle: in full where that is cheap, as a pairwise covering set elsewhere."""

import itertools

import pytest
import torch
from pairwise import pairwise

import turnout
from turnout.contracts import IDS_DTYPES, WEIGHTS_DTYPES
from turnout.testing.checks import assert_matches_oracle, assert_routing_valid
from turnout.testing.inputs import NAMED_LOGITS, every_kind_of_row, make_logits, poisoned_out

NUM_EXPERTS = (1, 7, 16, 60, 128, 192, 256, 258, 384, 512, 896)
TOP_K = (1, 2, 4, 5, 6, 8, 10, 16)
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PAIRWISE = pairwise(
    {
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "ids_dtype": IDS_DTYPES,
        "weights_dtype": WEIGHTS_DTYPES,
        "logits_dtype": LOGITS_DTYPES,
        "renormalize": (True, False),
        "scale_dtype": (None, torch.float32, torch.bfloat16, torch.float16),
        "rounding": ("none", "input"),
    },
    allowed=lambda case: case.get("top_k", 1) <= case.get("num_experts", 1000),
)


def case_id(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def make_scale(num_experts, dtype, device):
    if dtype is None:
        return None
    return torch.linspace(0.25, 2.0, num_experts).to(dtype).to(device)


@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_pairwise_covering_set(case, device, routed):
    logits = every_kind_of_row(
        case["num_experts"], case["logits_dtype"], device, ("normal", "tie_free", "quantised", "bit_patterns"), rows=2
    )
    scale = make_scale(case["num_experts"], case["scale_dtype"], device)
    spec = turnout.RouterSpec(
        num_experts=case["num_experts"],
        top_k=case["top_k"],
        renormalize=case["renormalize"],
        per_expert_scale=scale is not None,
        weights_rounding=case["rounding"],
    )
    contract = turnout.Contract(ids_dtype=case["ids_dtype"], weights_dtype=case["weights_dtype"])
    routed(logits, spec, contract, turnout.RoutingInputs(per_expert_scale=scale))


@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_full_grid(impl, num_experts):
    logits = every_kind_of_row(num_experts, names=("normal", "quantised", "bit_patterns"))
    for top_k in TOP_K:
        if top_k > num_experts:
            continue
        spec = turnout.RouterSpec(num_experts=num_experts, top_k=top_k, renormalize=True)
        for ids_dtype in IDS_DTYPES:
            for weights_dtype in WEIGHTS_DTYPES:
                contract = turnout.Contract(ids_dtype=ids_dtype, weights_dtype=weights_dtype)
                out = poisoned_out(len(logits), top_k, contract)
                routing = turnout.route(logits, spec, contract, out=out.tensors, impl=impl)
                assert out.topk_weights.guards_hold()
                assert out.topk_ids.guards_hold()
                assert_routing_valid(routing, logits, spec, contract)
                assert_matches_oracle(routing, logits, spec, contract)


@pytest.mark.parametrize("logits_dtype", LOGITS_DTYPES, ids=str)
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "as_they_are"])
@pytest.mark.parametrize("num_experts", [60, 128])
def test_every_kind_of_row(num_experts, renormalize, logits_dtype, device, routed):
    spec = turnout.RouterSpec(num_experts=num_experts, top_k=8, renormalize=renormalize, routed_scaling_factor=2.5)
    routed(every_kind_of_row(num_experts, logits_dtype, device), spec, turnout.Contract(ids_dtype=torch.int64))


@pytest.mark.parametrize("name", NAMED_LOGITS)
def test_all_experts_chosen(name, device, routed):
    """K = E leaves nothing out: the ids are a permutation, whatever the row."""
    spec = turnout.RouterSpec(num_experts=6, top_k=6, renormalize=True)
    routed(make_logits(name, 4, 6, device=device), spec, turnout.Contract())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_round_to_even(dtype, device, routed):
    """Weights half-way between two 16-bit numbers, subnormal ones and the largest among them."""
    unit, tiny, largest = (getattr(torch.finfo(dtype), name) for name in ("eps", "smallest_normal", "max"))
    halves = [1 + unit / 2, 1 + 3 * unit / 2, 1 + unit / 2 + unit / 64, -1 - unit / 2, -1 - 3 * unit / 2]
    scale = torch.tensor([*halves, tiny * unit / 2, 3 * tiny * unit / 2, tiny * 1.5, largest], device=device)
    spec = turnout.RouterSpec(num_experts=9, top_k=1, renormalize=True, per_expert_scale=True)
    contract = turnout.Contract(weights_dtype=dtype)
    routing = routed(torch.eye(9, device=device), spec, contract, turnout.RoutingInputs(per_expert_scale=scale))
    assert torch.equal(routing.topk_weights[:, 0], scale.to(dtype))


@pytest.mark.parametrize("num_experts", [1000, 1024])
def test_up_to_1024_experts(num_experts, device, routed):
    spec = turnout.RouterSpec(num_experts=num_experts, top_k=3, renormalize=False)
    logits = every_kind_of_row(
        num_experts, torch.bfloat16, device, ("tie_free", "quantised", "bit_patterns", "all_nan")
    )
    routed(logits, spec, turnout.Contract(ids_dtype=torch.int16))


def test_pairwise_covers_every_pair():
    """The generator itself: all pairs of values that K <= E allows occur in some case."""
    axes = {axis: {case[axis] for case in PAIRWISE} for axis in PAIRWISE[0]}
    assert axes["num_experts"] == set(NUM_EXPERTS)
    assert axes["top_k"] == set(TOP_K)
    for a, b in itertools.combinations(axes, 2):
        wanted = set(itertools.product(axes[a], axes[b]))
        if (a, b) == ("num_experts", "top_k"):
            wanted = {(num_experts, top_k) for num_experts, top_k in wanted if top_k <= num_experts}
        assert wanted == {(case[a], case[b]) for case in PAIRWISE}
