"""What remap_hidden_states writes, against an oracle of its own, into poisoned buffers."""

import pytest
import torch
from remap_cases import ROUTINGS, bits, make_ids, make_map, make_rows

from turnout.remap.api import HIDDEN_DTYPES, SCALES_DTYPES, remap_hidden_states

SIZES = [0, 1, 2, 15, 16, 17, 64, 257, 1024]


@pytest.mark.parametrize("kind", ROUTINGS)
def test_any_number_of_tokens(kind, remapped, device):
    """Both dtypes of ids, with a map and without, take turns over sizes and kinds; 1024 tokens fill several tiles."""
    for index, num_tokens in enumerate(SIZES, start=ROUTINGS.index(kind)):
        ids_dtype, with_map = (torch.int32, torch.int64)[index % 2], index // 2 % 2
        num_experts, num_total = 7, 20 if with_map else 7
        ids = make_ids(kind, num_tokens, 3, num_total, ids_dtype, device, seed=index)
        expert_map = make_map(num_total, num_experts, device) if with_map else None
        remapped(make_rows(num_tokens, 24, torch.bfloat16, device), ids, num_experts, expert_map)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", HIDDEN_DTYPES, ids=str)
def test_every_dtype_is_copied_bit_by_bit(dtype, ids_dtype, remapped, device):
    ids = make_ids("uniform", 17, 4, 12, ids_dtype, device)
    remapped(make_rows(17, 40, dtype, device), ids, 5, make_map(12, 5, device))


@pytest.mark.parametrize("dtype", SCALES_DTYPES, ids=str)
def test_scales_go_with_their_rows(dtype, remapped, device):
    hidden_states = make_rows(17, 64, torch.float8_e4m3fn, device)
    for columns in (1, 2, 70):  # the last: more than the row has
        scales = make_rows(17, columns, dtype, device, seed=1)
        remapped(hidden_states, make_ids("uniform", 17, 4, 12, device=device), 5, make_map(12, 5, device), scales)


@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 1), (1, 5), (3, 3), (5, 8), (7, 33), (11, 60), (33, 33)])
def test_any_k_up_to_all_experts(top_k, num_experts, remapped, device):
    ids = make_ids("uniform", 9, top_k, num_experts, device=device)
    remapped(make_rows(9, 3, torch.float32, device), ids, num_experts)


@pytest.mark.parametrize("num_experts", [31, 32, 100, 1024])
def test_number_of_experts(num_experts, remapped, device):
    ids = make_ids("uniform", 33, 5, num_experts, device=device)
    remapped(make_rows(33, 8, torch.float16, device), ids, num_experts)


def test_an_expert_twice_in_a_row(remapped, device):
    ids = torch.tensor([[2, 2, 0], [2, 2, 2], [1, 0, 1]], device=device)
    result = remapped(make_rows(3, 4, torch.float32, device), ids, 3)
    assert result.inv_permuted_idx.tolist() == [[4, 5, 0], [6, 7, 8], [2, 1, 3]]


def test_the_example_of_the_docstring(remapped, device):
    rows = torch.tensor([[1.0], [2.0]], device=device)
    result = remapped(rows, torch.tensor([[2, 0], [2, 1]], device=device), 3)
    assert result.hidden_states.flatten().tolist() == [1.0, 2.0, 1.0, 2.0]
    assert result.tokens_per_expert.tolist() == [1, 1, 2]
    assert result.inv_permuted_idx.tolist() == [[2, 0], [3, 1]]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_minus_one_with_a_map_is_skipped_aiter_4636(ids_dtype, remapped, device):
    """In vllm-xpu-kernels it reads the map at -1. Here the int before the map would make it expert 0."""
    memory = torch.zeros(9, dtype=torch.int32, device=device)
    memory[1:] = make_map(8, 3, device)
    ids = torch.tensor([[-1, 2], [3, -1], [-1, -1]], dtype=ids_dtype, device=device)
    result = remapped(make_rows(3, 8, torch.bfloat16, device), ids, 3, memory[1:])
    assert (result.inv_permuted_idx[ids == -1] == -1).all()


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("with_map", [False, True], ids=["local_ids", "expert_map"])
def test_ids_outside_are_skipped_vllm_50845_27917(with_map, ids_dtype, remapped, device):
    """Ids that a sign check lets through: from E on, and whatever lies in memory that nobody wrote."""
    limits = torch.iinfo(ids_dtype)
    ids = [[0, 5, 6], [8, 9, 1], [limits.max, limits.min, -2], [2**31 - 1, 1 - 2**31, 2]]
    ids = torch.tensor(ids, dtype=ids_dtype, device=device)
    expert_map = make_map(9, 6, device) if with_map else None
    result = remapped(make_rows(4, 8, torch.bfloat16, device), ids, 6, expert_map)
    assert (result.inv_permuted_idx[ids > 8] == -1).all()


def test_64_bit_ids_are_not_cut_to_32(remapped, device):
    ids = torch.tensor([[2**32, 1], [2**32 + 2, -(2**32)], [2**33, 2**62]], device=device)
    result = remapped(make_rows(3, 8, torch.bfloat16, device), ids, 4, make_map(4, 4, device))
    assert result.tokens_per_expert.sum() == 1


def test_entries_of_a_map_that_are_no_expert_are_skipped(remapped, device):
    expert_map = torch.tensor([0, 3, -7, 2, 2**31 - 1, 1], dtype=torch.int32, device=device)
    ids = make_ids("uniform", 8, 6, 6, device=device)
    result = remapped(make_rows(8, 8, torch.bfloat16, device), ids, 3, expert_map)
    assert result.tokens_per_expert.tolist() == [8, 8, 8]


def test_nothing_local(remapped, device):
    expert_map = torch.full((8,), -1, dtype=torch.int32, device=device)
    result = remapped(
        make_rows(5, 8, torch.float32, device), make_ids("uniform", 5, 3, 8, device=device), 2, expert_map
    )
    assert not bits(result.hidden_states).any()


def test_strided_rows(remapped, device):
    wide = make_rows(17, 48, torch.bfloat16, device)
    scales = make_rows(17, 6, torch.float32, device)
    ids = make_ids("uniform", 17, 3, 6, device=device)
    remapped(wide[:, 5:35], ids, 6)
    remapped(wide[:, 5:35], ids, 6, scales=scales[:, 1:4])
    remapped(wide[::2], ids[::2].contiguous(), 6)


def test_one_row_for_all_tokens(remapped, device):
    hidden_states = make_rows(1, 24, torch.bfloat16, device).expand(9, 24)
    remapped(hidden_states, make_ids("uniform", 9, 3, 6, device=device), 6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_rows_further_apart_than_32_bits_vllm_xpu_kernels_269(dtype, remapped, device):
    """The second row starts past 2^31 elements. (The memory between them is never touched.)"""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of GPU memory")
    stride = 2**31 + 24
    memory = torch.empty(stride + 8, dtype=dtype, device=device)
    hidden_states = memory.as_strided((2, 8), (stride, 1))
    hidden_states.copy_(make_rows(2, 8, dtype, device))
    remapped(hidden_states, torch.tensor([[1, 0], [0, 2]], device=device), 3)


def test_the_same_bits_at_every_run(impl, device):
    hidden_states = make_rows(257, 8, torch.bfloat16, device)
    ids = make_ids("one_hot", 257, 4, 5, device=device)
    first = remap_hidden_states(hidden_states, ids, 5, impl=impl)
    for _ in range(3):
        again = remap_hidden_states(hidden_states, ids, 5, impl=impl)
        for one, other in zip(first[:3], again[:3], strict=True):
            assert (bits(one) == bits(other)).all()
