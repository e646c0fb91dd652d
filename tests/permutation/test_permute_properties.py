"""What holds of every permutation, over ids that hypothesis draws."""

import itertools

import hypothesis
import torch
from hypothesis import strategies as st

import turnout
from turnout.testing.permutation import assert_permutation_matches

NAMES = ("tokens_per_expert", "expert_offsets", "permuted_idx", "inv_permuted_idx", "num_tokens_post_padded")
CONTRACT = turnout.Contract(structures=NAMES, block_size=4)
EXAMPLES = {"reference": 50, "cpu": 100, "triton": 5}


@st.composite
def routings(draw):
    """Ids [T, K], some of them no expert's, and the number of experts."""
    num_experts = draw(st.integers(1, 40))
    num_tokens, top_k = draw(st.integers(0, 24)), draw(st.integers(1, 4))
    ids = draw(st.lists(st.integers(-2, num_experts + 1), min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    return torch.tensor(ids, dtype=torch.int32).view(num_tokens, top_k), num_experts


def holds_of_drawn_routings(impl, device, check):
    """Run ``check(ids, num_experts, permute)`` on routings that hypothesis draws."""

    def permute(ids, num_experts):
        return turnout.permute(ids.to(device), num_experts, CONTRACT, impl=impl)

    @hypothesis.settings(max_examples=EXAMPLES[impl])
    @hypothesis.given(routings())
    def run(routing):
        check(*routing, permute)

    run()


def test_it_is_the_oracle_s(impl, device):
    def check(ids, num_experts, permute):
        assert_permutation_matches(permute(ids, num_experts), ids.to(device), num_experts, CONTRACT)

    holds_of_drawn_routings(impl, device, check)


def test_it_is_a_bijection_and_a_round_trip(impl, device):
    """Each slot of an expert has one position, and the slot at that position is it."""

    def check(ids, num_experts, permute):
        permutation = permute(ids, num_experts)
        position, slot_at = permutation.inv_permuted_idx.flatten().cpu(), permutation.permuted_idx.cpu()
        slots = torch.arange(ids.numel(), dtype=torch.int32)
        has_position = position >= 0
        used = int(has_position.sum())
        assert torch.equal(slot_at[position[has_position]], slots[has_position])
        assert torch.equal(position[has_position].sort().values, slots[:used])
        assert (slot_at[used:] == -1).all()

    holds_of_drawn_routings(impl, device, check)


def test_offsets_rise_to_the_number_of_slots_that_have_an_expert(impl, device):
    def check(ids, num_experts, permute):
        permutation = permute(ids, num_experts)
        offsets = permutation.expert_offsets.cpu()
        assert torch.equal(offsets.diff(), permutation.tokens_per_expert.cpu())
        assert (offsets.diff() >= 0).all()
        assert int(offsets[0]) == 0
        assert int(offsets[-1]) == int(((ids >= 0) & (ids < num_experts)).sum())
        assert int(permutation.num_tokens_post_padded) == 4 * int(((offsets.diff() + 3) // 4).sum())

    holds_of_drawn_routings(impl, device, check)


def test_the_order_of_tokens_carries_over(impl, device):
    """Tokens in another order: the same slots for each expert, told in the new order."""

    def check(ids, num_experts, permute):
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(len(ids)))
        one, other = permute(ids, num_experts), permute(ids[order].contiguous(), num_experts)
        assert torch.equal(one.tokens_per_expert, other.tokens_per_expert)
        slots = torch.arange(ids.numel()).view(ids.shape)[order].flatten()  # of the first, by slot of the second
        offsets = one.expert_offsets.tolist()
        for first, end in itertools.pairwise(offsets):
            moved = slots[other.permuted_idx[first:end].cpu().long()]
            assert torch.equal(moved.sort().values, one.permuted_idx[first:end].cpu().long())

    holds_of_drawn_routings(impl, device, check)


def test_the_names_of_experts_carry_over(impl, device):
    """Experts renamed: each keeps its slots, in the same order."""

    def check(ids, num_experts, permute):
        names = torch.randperm(num_experts, generator=torch.Generator().manual_seed(num_experts)).int()
        is_expert = (ids >= 0) & (ids < num_experts)
        renamed = torch.where(is_expert, names[ids.clamp(0, num_experts - 1).long()], ids)
        one, other = permute(ids, num_experts), permute(renamed, num_experts)
        for expert, name in enumerate(names.tolist()):
            assert torch.equal(slots_of(one, expert), slots_of(other, name))

    holds_of_drawn_routings(impl, device, check)


def slots_of(permutation, expert):
    first, end = permutation.expert_offsets[expert : expert + 2].tolist()
    return permutation.permuted_idx[first:end]


def test_it_is_the_same_at_every_run(impl, device):
    ids = torch.randint(0, 6, (70, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(device)
    one, other = (turnout.permute(ids, 6, CONTRACT, impl=impl) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert a is b is None or torch.equal(a, b)
