"""Every structure against the oracle: sizes, dtypes, distributions, ids that are no expert."""

import pytest
import torch

import turnout
from turnout.contracts import IDS_DTYPES, STRUCTURES, STRUCTURES_DTYPES, WEIGHTS_DTYPES
from turnout.impls import launch_of
from turnout.testing.inputs import poisoned_buffer
from turnout.testing.permutation import make_ids

ALL = turnout.Contract(structures=STRUCTURES, block_size=4, sentinel=-1)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "block_size"),
    [
        (0, 5, 2, 4),
        (1, 1, 1, 1),
        (1, 128, 8, 16),
        (2, 36, 3, 7),
        (15, 60, 6, 3),
        (16, 5, 5, 64),
        (17, 33, 4, 1),
        (64, 7, 2, 16),
    ],
)
def test_sizes(num_tokens, num_experts, top_k, block_size, permuted, device):
    """E, K and the size of a block not powers of two, K = 1 and K = E, fewer slots than experts, no slots."""
    contract = turnout.Contract(structures=STRUCTURES, block_size=block_size)
    permuted(make_ids("uniform", num_tokens, num_experts, top_k, device=device), num_experts, contract)


@pytest.mark.parametrize("kind", ["skewed", "one_hot", "few", "sentinels", "idle"])
def test_distributions(kind, permuted, device):
    permuted(make_ids(kind, 65, 12, 3, device=device), 12, ALL)


@pytest.mark.parametrize("ids_dtype", IDS_DTYPES, ids=str)
@pytest.mark.parametrize("structures_dtype", STRUCTURES_DTYPES, ids=str)
def test_dtypes(ids_dtype, structures_dtype, permuted, device):
    weights_dtype = WEIGHTS_DTYPES[IDS_DTYPES.index(ids_dtype) % 3]
    contract = turnout.Contract(
        structures=STRUCTURES, block_size=2, structures_dtype=structures_dtype, weights_dtype=weights_dtype
    )
    permuted(make_ids("sentinels", 9, 40, 4, ids_dtype, device), 40, contract)


@pytest.mark.parametrize("name", STRUCTURES)
def test_each_structure_alone(name, permuted, device):
    """Nothing depends on a buffer that another structure would have had."""
    contract = turnout.Contract(structures=(name,), block_size=5)
    permuted(make_ids("sentinels", 11, 9, 3, device=device), 9, contract)


def test_the_example_of_the_documentation(impl, device):
    ids = torch.tensor([[2, 0], [2, 1]], device=device)
    names = ("tokens_per_expert", "expert_offsets", "permuted_idx", "inv_permuted_idx")
    permutation = turnout.permute(ids, 3, turnout.Contract(structures=names), impl=impl)
    assert permutation.tokens_per_expert.tolist() == [1, 1, 2]
    assert permutation.expert_offsets.tolist() == [0, 1, 2, 4]
    assert permutation.permuted_idx.tolist() == [1, 3, 0, 2]
    assert permutation.inv_permuted_idx.tolist() == [[2, 0], [3, 1]]


def test_the_example_of_moe_align_block_size(impl, device):
    """vLLM's own, in its docstring: experts from 1 to 4, blocks of four."""
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], device=device)
    contract = turnout.Contract(structures=("sorted_token_ids", "expert_ids", "num_tokens_post_padded"), block_size=4)
    permutation = turnout.permute(ids, 5, contract, impl=impl)
    used = int(permutation.num_tokens_post_padded)
    assert used == 16
    wanted = [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert permutation.sorted_token_ids[:used].tolist() == wanted
    assert permutation.sorted_token_ids[used:].eq(12).all()
    assert permutation.expert_ids.tolist() == [1, 2, 3, 4, -1, -1]


def test_an_expert_chosen_twice_in_a_row(permuted, device):
    """`route` never writes that, but ids of another producer may (padding of expert parallelism)."""
    permuted(torch.tensor([[3, 3, 0], [1, 3, 1]], dtype=torch.int32, device=device), 4, ALL)


def test_ids_through_a_map_are_those_that_it_gives(impl, device):
    """Which remap asks of the launch: ids outside of the map, and entries that are no expert, have no position."""
    ids = torch.tensor([[2, 0, 7], [5, 1, -1], [3, 6, 4]], dtype=torch.int16, device=device)
    expert_map = torch.tensor([1, -1, 0, 2, 3, 2, 9], dtype=torch.int32, device=device)
    mapped = torch.tensor([[0, 1, -1], [2, -1, -1], [2, 9, 3]], dtype=torch.int32, device=device)
    weights = torch.arange(9.0, device=device).view(3, 3)
    want = turnout.permute(mapped, 4, ALL, topk_weights=weights, impl=impl)
    buffers = [poisoned_buffer(tuple(t.shape), t.dtype, t.device, 0x7B) for t in want]
    launch_of("permutation", impl)(ids, weights, 4, ALL, turnout.Permutation(*(b.tensor for b in buffers)), expert_map)
    for name, buffer, right in zip(STRUCTURES, buffers, want, strict=True):
        assert buffer.guards_hold(), name
        assert torch.equal(buffer.tensor, right), name
