"""Failures that users of other kernels reported of what follows routing, each as a test of ours.

Numbered as in tests/routing/test_field_failures.py. 11, 13, 16 and the counts of 19 are in
test_route_with_structures.py.
"""

import pytest
import torch

import turnout
from turnout.contracts import STRUCTURES
from turnout.testing.inputs import make_logits
from turnout.testing.permutation import assert_permutation_matches, make_ids

CONTRACT = turnout.Contract(structures=STRUCTURES, block_size=16, sentinel=-1)


def test_ids_past_the_last_expert_do_not_leave_the_buffers_vllm_27917(permuted, device):
    """26: moe_align wrote out of bounds for ids of E and more."""
    ids = torch.tensor([[5, 6, 7], [2**31 - 1, 0, -(2**31)], [5, 5, 100]], dtype=torch.int32, device=device)
    permutation = permuted(ids, 6, CONTRACT)
    assert permutation.tokens_per_expert.tolist() == [1, 0, 0, 0, 0, 3]


def test_what_is_past_the_used_part_says_so_uccl_987(permuted, device):
    """28: rows past the received count were never written, and read as if they had been."""
    permutation = permuted(make_ids("sentinels", 13, 9, 3, device=device), 9, CONTRACT)
    used = int(permutation.expert_offsets[-1])
    assert 0 < used < 39
    assert (permutation.permuted_idx[used:] == -1).all()
    assert (permutation.permuted_weights[used:] == 0).all()
    blocks = int(permutation.num_tokens_post_padded) // 16
    assert (permutation.expert_ids[blocks:] == -1).all()
    assert (permutation.sorted_token_ids[blocks * 16 :] == 39).all()
    assert (permutation.block_schedule[0, int(permutation.block_offsets[0, -1]) :] == -1).all()


@pytest.mark.parametrize("num_experts", [36, 1, 31, 33, 100])
def test_numbers_of_experts_that_no_block_divides_sglang_29055(num_experts, permuted, device):
    """17: ids of -1 with 36 experts broke a histogram made for multiples of 16."""
    permuted(make_ids("sentinels", 10, num_experts, min(4, num_experts), device=device), num_experts, CONTRACT)


@pytest.mark.parametrize("shape", [(128, 8), (128, 7), (127, 8), (64, 8), (256, 4)], ids=str)
def test_specialisations_are_not_mixed_up_metax_270(shape, permuted, device):
    """29: one geometry was given the kernel of another."""
    num_experts, top_k = shape
    permuted(make_ids("uniform", 5, num_experts, top_k, device=device), num_experts, CONTRACT)


def test_dtypes_in_turn_do_not_serve_each_other_metax_270(impl, device):
    """29 again: calls that differ in one thing each; what is kept of one must not serve another."""
    for _ in range(2):
        for ids_dtype in (torch.int16, torch.int64):
            for structures_dtype in (torch.int32, torch.int64):
                for offset in (0, 1):  # the second is aligned to no 16 bytes
                    memory = make_ids("uniform", 7, 12, 3, ids_dtype, device).flatten()
                    memory = torch.cat([memory.new_zeros(offset), memory])
                    ids = memory[offset:].view(7, 3)
                    names = ("permuted_idx", "expert_offsets")
                    contract = turnout.Contract(structures=names, structures_dtype=structures_dtype)
                    permutation = turnout.permute(ids, 12, contract, impl=impl)
                    assert_permutation_matches(permutation, ids, 12, contract)


def test_an_id_that_comes_twice_in_a_row_counts_twice(impl, device):
    """The torch fallback of vLLM's CPU experts counted an id that comes twice in a row once."""
    contract = turnout.Contract(structures=("tokens_per_expert",))
    ids = torch.tensor([[1, 1, 1], [0, 1, 0]], device=device)
    assert turnout.permute(ids, 2, contract, impl=impl).tokens_per_expert.tolist() == [2, 4]


def test_structures_follow_the_logits_of_each_call(impl, device):
    """Nothing of one call's structures serves the next: two batches of the same shape."""
    spec = turnout.RouterSpec(num_experts=10, top_k=2, renormalize=True)
    for seed in (0, 1):
        logits = make_logits("normal", 6, 10, device=device, seed=seed)
        routing = turnout.route(logits, spec, CONTRACT, impl=impl)
        assert_permutation_matches(routing, routing.topk_ids, 10, CONTRACT, routing.topk_weights)
