"""Properties of remapping that hold of any ids and any map."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from remap_cases import bits

import turnout
from turnout.remap.api import remap_hidden_states

# In the interpreter each call takes a tenth of a second.
EXAMPLES = hypothesis.settings(
    max_examples=12, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)  # fmt: skip


@st.composite
def cases(draw):
    """Ids [T, K], those that are nobody's among them; experts of this rank; a map of ids to them, or None."""
    num_tokens, top_k = draw(st.integers(0, 24)), draw(st.sampled_from([1, 3, 6]))  # few, as a GPU compiles for each
    num_experts = draw(st.sampled_from([1, 5, 9]))
    expert_map = None
    if draw(st.booleans()):
        entries = st.lists(st.integers(-2, num_experts + 1), min_size=1, max_size=12)
        expert_map = torch.tensor(draw(entries), dtype=torch.int32)
    slots = num_tokens * top_k
    ids = draw(st.lists(st.integers(-3, 13), min_size=slots, max_size=slots))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return torch.tensor(ids, dtype=dtype).view(num_tokens, top_k), num_experts, expert_map


def numbered(num_tokens, device):
    """Rows whose values say which token they are of: token t has t + 1 everywhere."""
    return torch.arange(1, num_tokens + 1, dtype=torch.float32, device=device)[:, None].repeat(1, 3)


@pytest.fixture
def remap(impl, device):
    def call(hidden_states, topk_ids, num_experts, expert_map):
        expert_map = None if expert_map is None else expert_map.to(device)
        return remap_hidden_states(hidden_states, topk_ids.to(device), num_experts, expert_map=expert_map, impl=impl)

    return call


def local_ids(topk_ids, num_experts, expert_map):
    """The expert of each slot, or -1, in Python."""
    ids = topk_ids.flatten().tolist()
    if expert_map is not None:
        ids = [int(expert_map[i]) if 0 <= i < len(expert_map) else -1 for i in ids]
    return np.array([i if 0 <= i < num_experts else -1 for i in ids], dtype=np.int64)


@EXAMPLES
@hypothesis.given(case=cases())
def test_local_slots_and_rows_in_use_are_paired_one_to_one(case, remap, device):
    topk_ids, num_experts, expert_map = case
    result = remap(numbered(len(topk_ids), device), topk_ids, num_experts, expert_map)
    positions, local = bits(result.inv_permuted_idx).flatten(), local_ids(*case)
    assert ((positions >= 0) == (local >= 0)).all()
    used = positions[positions >= 0]
    assert sorted(used) == list(range(len(used)))
    assert bits(result.tokens_per_expert).tolist() == [int((local == e).sum()) for e in range(num_experts)]


@EXAMPLES
@hypothesis.given(case=cases())
def test_rows_are_by_expert_and_inside_an_expert_by_token(case, remap, device):
    topk_ids, num_experts, expert_map = case
    result = remap(numbered(len(topk_ids), device), topk_ids, num_experts, expert_map)
    tokens = result.hidden_states[:, 0].tolist()
    positions, local = bits(result.inv_permuted_idx).flatten(), local_ids(*case)
    ends = np.cumsum(bits(result.tokens_per_expert))
    for slot, position in enumerate(positions):
        if position >= 0:
            assert tokens[position] == slot // topk_ids.shape[1] + 1
            assert np.searchsorted(ends, position, side="right") == local[slot]
    used = int(ends[-1])
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        assert tokens[start:end] == sorted(tokens[start:end])
    assert tokens[used:] == [0.0] * (len(tokens) - used)


@EXAMPLES
@hypothesis.given(case=cases())
def test_gathering_the_rows_restores_each_token(case, remap, device):
    """The round trip: K equal parts of a token, as far as its slots are local, sum to that part of it."""
    topk_ids, num_experts, expert_map = case
    num_tokens, top_k = topk_ids.shape
    hidden_states = numbered(num_tokens, device)
    result = remap(hidden_states, topk_ids, num_experts, expert_map)
    weights = torch.full((num_tokens, top_k), 0.5, device=device)
    restored = turnout.combine(result.hidden_states, weights, result.inv_permuted_idx, impl="reference")
    share = torch.from_numpy((local_ids(*case) >= 0).reshape(num_tokens, top_k).sum(axis=1) * 0.5)
    assert torch.equal(restored.cpu(), hidden_states.cpu() * share.float()[:, None])


def run_of_each(result):
    """The rows of each expert."""
    ends = np.cumsum(bits(result.tokens_per_expert))
    return [result.hidden_states[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@EXAMPLES
@hypothesis.given(case=cases(), data=st.data())
def test_experts_renamed_change_places_and_nothing_else(case, data, remap, device):
    """Renaming experts by a map moves their runs of rows; each run stays what it was."""
    topk_ids, num_experts, _ = case
    hidden_states = numbered(len(topk_ids), device)
    names = torch.tensor(data.draw(st.permutations(range(num_experts))), dtype=torch.int32)
    plain, renamed = (remap(hidden_states, topk_ids, num_experts, m) for m in (None, names))
    runs = [run_of_each(result) for result in (plain, renamed)]
    for expert, name in enumerate(names.tolist()):
        assert torch.equal(runs[0][expert], runs[1][name])


@EXAMPLES
@hypothesis.given(case=cases())
def test_a_map_does_what_mapped_ids_do(case, remap, device):
    topk_ids, num_experts, expert_map = case
    hidden_states = numbered(len(topk_ids), device)
    mapped = torch.from_numpy(local_ids(*case)).view_as(topk_ids)
    one = remap(hidden_states, topk_ids, num_experts, expert_map)
    other = remap(hidden_states, mapped, num_experts, None)
    for a, b in zip(one[:3], other[:3], strict=True):
        assert (bits(a) == bits(b)).all()
