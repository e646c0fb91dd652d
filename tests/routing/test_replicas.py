"""Physical ids (EPLB), the load they leave behind, and logical ids kept for a replay."""

import dataclasses

import numpy as np
import pytest
import torch

import turnout
from turnout.testing.inputs import make_logits, poisoned_out

SPEC = turnout.RouterSpec(
    num_experts=16, top_k=4, scoring_func="sigmoid", e_score_correction_bias=True, renormalize=True
)
CONTRACT = turnout.Contract(ids_dtype=torch.int32, id_space="physical", sentinel=-1)
LOGICAL = dataclasses.replace(CONTRACT, id_space="logical")
NUM_TOKENS, NUM_PHYSICAL, MAX_REPLICAS = 9, 24, 3
COUNTS = np.array([1, 2, 3, 1, 1, 2, 1, 3, 1, 1, 2, 1, 1, 2, 1, 1])
PADDING = np.array([0, 0, 1, 0, 0, 0, 1, 0, 0], dtype=bool)


def replicas():
    """[E, R]: physical ids in random order, -1 past the count of each expert."""
    assert COUNTS.sum() == NUM_PHYSICAL
    is_used = np.arange(MAX_REPLICAS) < COUNTS[:, None]
    table = np.full(is_used.shape, -1, dtype=np.int64)
    table[is_used] = np.random.default_rng(5).permutation(NUM_PHYSICAL)
    return table


def inputs_of(device, **further):
    return turnout.RoutingInputs(
        e_score_correction_bias=torch.linspace(-0.2, 0.2, 16, device=device),
        logical_to_physical_map=torch.from_numpy(replicas()).to(device),
        logical_replica_count=torch.from_numpy(COUNTS).to(device),
        **further,
    )


def logical_routing(logits, impl, **further):
    inputs = dataclasses.replace(
        inputs_of(logits.device, **further), logical_to_physical_map=None, logical_replica_count=None
    )
    return turnout.route(logits, SPEC, LOGICAL, inputs, impl=impl)


def physical_of(logical):
    """The replica of each expert that a row's number chooses; what is no expert stays so."""
    hashed = (np.arange(len(logical)) * 2654435769 & 0xFFFFFFFF)[:, None]
    return np.where(logical < 0, -1, replicas()[logical, hashed % COUNTS[logical]])


def load_of(ids, num_counted):
    counted = ids[:num_counted]
    return np.bincount(counted[counted >= 0], minlength=NUM_PHYSICAL)


@pytest.fixture
def logits(device):
    return make_logits("normal", NUM_TOKENS, 16, device=device)


def test_physical_ids_are_replicas_chosen_by_the_row(impl, device, logits):
    logical = logical_routing(logits, impl)
    want = physical_of(logical.topk_ids.cpu().numpy())
    out = poisoned_out(NUM_TOKENS, 4, CONTRACT, device)
    routing = turnout.route(logits, SPEC, CONTRACT, inputs_of(device), out=out.tensors, impl=impl)
    assert all(buffer.guards_hold() for buffer in out)
    np.testing.assert_array_equal(routing.topk_ids.cpu().numpy(), want)
    assert torch.equal(routing.topk_weights, logical.topk_weights)
    allocated = turnout.route(logits, SPEC, CONTRACT, inputs_of(device), impl=impl)
    assert torch.equal(allocated.topk_ids, routing.topk_ids)
    assert torch.equal(allocated.topk_weights, routing.topk_weights)


def test_many_rows_reach_every_replica(impl, device):
    """A hash of the row that always gave the first replica would pass on few rows of single ones."""
    logits = torch.zeros(32, 16, device=device)
    forced = torch.tensor([[1, 2, 5, 7]], device=device).repeat(32, 1)
    inputs = inputs_of(device, forced_ids=forced)
    ids = turnout.route(logits, SPEC, CONTRACT, inputs, impl=impl).topk_ids.cpu().numpy()
    np.testing.assert_array_equal(ids, physical_of(forced.cpu().numpy()))
    for slot, expert in enumerate([1, 2, 5, 7]):
        assert set(ids[:, slot]) == set(replicas()[expert, : COUNTS[expert]])


@pytest.mark.parametrize("num_counted", [None, 0, 5, NUM_TOKENS, 100])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_load_is_a_bincount_of_the_rows_that_count(num_counted, is_padded, impl, device, logits):
    further = {"is_padding": torch.from_numpy(PADDING).to(device)} if is_padded else {}
    load = torch.arange(NUM_PHYSICAL, dtype=torch.int32, device=device)  # added to, not overwritten
    counted = None if num_counted is None else torch.tensor([num_counted], dtype=torch.int32, device=device)
    inputs = inputs_of(device, expert_load=load, num_counted_tokens=counted, **further)
    ids = turnout.route(logits, SPEC, CONTRACT, inputs, impl=impl).topk_ids.cpu().numpy()
    want = load_of(ids, NUM_TOKENS if num_counted is None else num_counted)
    np.testing.assert_array_equal(load.cpu().numpy() - np.arange(NUM_PHYSICAL), want)
    if is_padded:
        assert (ids[PADDING] == -1).all()
        assert want.sum() <= 4 * (~PADDING).sum()


def test_num_valid_tokens_ends_the_load_too(impl, device, logits):
    load = torch.zeros(NUM_PHYSICAL, dtype=torch.int32, device=device)
    num_valid = torch.tensor([4], dtype=torch.int32, device=device)
    inputs = inputs_of(device, expert_load=load, num_valid_tokens=num_valid)
    ids = turnout.route(logits, SPEC, CONTRACT, inputs, impl=impl).topk_ids.cpu().numpy()
    np.testing.assert_array_equal(load.cpu().numpy(), load_of(ids, 4))
    assert load.sum() == 16


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one"])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_nothing_is_recorded_where_record_load_is_false(shape, is_recorded, impl, device, logits):
    load = torch.zeros(NUM_PHYSICAL, dtype=torch.int32, device=device)
    record = torch.full(shape, is_recorded, device=device)
    inputs = inputs_of(device, expert_load=load, record_load=record)
    ids = turnout.route(logits, SPEC, CONTRACT, inputs, impl=impl).topk_ids.cpu().numpy()
    np.testing.assert_array_equal(load.cpu().numpy(), load_of(ids, NUM_TOKENS if is_recorded else 0))


def test_an_expert_without_a_replica_is_the_sentinel_and_counts_nowhere(impl, device, logits):
    load = torch.zeros(NUM_PHYSICAL, dtype=torch.int32, device=device)
    inputs = inputs_of(device, expert_load=load)
    inputs.logical_to_physical_map[3] = -1
    routing = turnout.route(logits, SPEC, CONTRACT, inputs, impl=impl)
    ids, is_gone = routing.topk_ids.cpu().numpy(), (logical_routing(logits, impl).topk_ids == 3).cpu().numpy()
    assert is_gone.any()
    assert (ids[is_gone] == -1).all()
    assert (routing.topk_weights.cpu().numpy()[is_gone] == 0).all()
    np.testing.assert_array_equal(load.cpu().numpy(), load_of(ids, NUM_TOKENS))


@pytest.mark.parametrize("contract", [LOGICAL, CONTRACT], ids=["logical", "physical"])
def test_replay_ids_are_logical_and_minus_one_for_padding(contract, impl, device, logits):
    padding = torch.from_numpy(PADDING).to(device)
    replay = torch.full((NUM_TOKENS, 4), 0x5A5A, dtype=torch.int16, device=device)
    inputs = inputs_of(device, is_padding=padding, replay_ids=replay)
    if contract is LOGICAL:
        inputs = dataclasses.replace(inputs, logical_to_physical_map=None, logical_replica_count=None)
    routing = turnout.route(logits, SPEC, contract, inputs, impl=impl)
    want = logical_routing(logits, impl, is_padding=padding).topk_ids.cpu().numpy()
    assert (want[PADDING] == -1).all()
    np.testing.assert_array_equal(replay.cpu().numpy(), want)
    ids = physical_of(want) if contract is CONTRACT else want
    np.testing.assert_array_equal(routing.topk_ids.cpu().numpy(), ids)


def test_a_replay_gives_the_routing_again(impl, device, logits):
    replay = torch.empty(NUM_TOKENS, 4, dtype=torch.int16, device=device)
    padding = torch.from_numpy(PADDING).to(device)
    first = turnout.route(logits, SPEC, CONTRACT, inputs_of(device, is_padding=padding, replay_ids=replay), impl=impl)
    again = turnout.route(logits, SPEC, CONTRACT, inputs_of(device, forced_ids=replay), impl=impl)
    assert torch.equal(first.topk_ids, again.topk_ids)
    assert torch.equal(first.topk_weights, again.topk_weights)
