"""`turnout.route` under a contract with structures: what it writes is what the ids that it wrote call for."""

import dataclasses

import pytest
import torch

import turnout
from turnout.contracts import STRUCTURES
from turnout.testing.checks import assert_bitwise_equal, assert_matches_oracle, assert_routing_valid
from turnout.testing.inputs import every_kind_of_row, make_logits
from turnout.testing.permutation import assert_permutation_matches

CONTRACT = turnout.Contract(structures=STRUCTURES, block_size=16, sentinel=-1)


@pytest.fixture(autouse=True)
def interpreter_tile(impl, monkeypatch, kernel_device):
    """In the interpreter, sixteen rows a program: its cost is per program and operation, not per row."""
    if impl == "triton" and kernel_device.type == "cpu":
        from turnout.routing import triton as kernels

        monkeypatch.setattr(kernels, "choose_tile", lambda *_: kernels.Tile(rows=16, num_warps=1))


@pytest.fixture
def routed(impl, poisoned):
    """``turnout.route`` with structures in poisoned buffers, checked against both oracles."""

    def route(logits, spec, contract, **inputs):
        inputs = turnout.RoutingInputs(**inputs)
        routing = turnout.route(logits, spec, contract, inputs, impl=impl)
        assert all(buffer.guards_hold() for buffer in poisoned[-1].buffers), "written outside a buffer"
        num_ids = contract.num_ids(spec.num_experts)
        assert_permutation_matches(routing, routing.topk_ids, num_ids, contract, routing.topk_weights)
        if contract.id_space == "logical":
            assert_routing_valid(routing, logits, spec, contract, inputs)
            assert_matches_oracle(routing, logits, spec, contract, inputs)
        plain = dataclasses.replace(contract, structures=())
        assert_bitwise_equal(turnout.route(logits, spec, plain, inputs, impl=impl), routing)
        return routing

    return route


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "renormalize"),
    [(0, 8, 2, True), (1, 128, 8, True), (1, 1, 1, False), (5, 36, 6, False), (17, 60, 5, True), (33, 9, 9, False)],
)
def test_sizes(num_tokens, num_experts, top_k, renormalize, routed, device):
    spec = turnout.RouterSpec(num_experts=num_experts, top_k=top_k, renormalize=renormalize)
    routed(make_logits("quantised", num_tokens, num_experts, device=device), spec, CONTRACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_bit_pattern_in_the_form_of_triton_kernels(dtype, routed, device):
    names = ("tokens_per_expert", "expert_offsets", "permuted_idx", "inv_permuted_idx", *STRUCTURES[8:])
    contract = turnout.Contract(ids_dtype=torch.int16, weights_dtype=torch.bfloat16, sentinel=-1, structures=names)
    spec = turnout.RouterSpec(num_experts=32, top_k=4, renormalize=True)
    routed(every_kind_of_row(32, dtype, device), spec, contract)


@pytest.mark.parametrize("sentinel", [-1, "num_experts", 1000])
def test_padding_is_counted_nowhere_vllm_38128(sentinel, routed, device):
    """19, of the counts: padded rows polluted them."""
    contract = dataclasses.replace(CONTRACT, sentinel=sentinel, ids_dtype=torch.int16, structures_dtype=torch.int64)
    spec = turnout.RouterSpec(num_experts=12, top_k=3, renormalize=True, per_expert_scale=True)
    routing = routed(
        make_logits("normal", 9, 12, device=device),
        spec,
        contract,
        per_expert_scale=torch.linspace(0.5, 2, 12, device=device),
        is_padding=torch.arange(9, device=device) % 3 == 1,
        num_valid_tokens=torch.tensor([7], dtype=torch.int32, device=device),
    )
    assert int(routing.tokens_per_expert.sum()) == 3 * 5


@pytest.mark.parametrize("sentinel", [-1, "num_experts"])
@pytest.mark.parametrize("ids_dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_local_ids_vllm_gaudi_1593_aiter_4636(ids_dtype, sentinel, routed, device):
    """11 and 16: each rank counts its own experts; a slot of another rank has the sentinel and weight 0."""
    contract = dataclasses.replace(
        CONTRACT, id_space="local", num_local_experts=5, sentinel=sentinel, ids_dtype=ids_dtype
    )
    spec = turnout.RouterSpec(num_experts=12, top_k=4, renormalize=True)
    logits = make_logits("normal", 7, 12, device=device)
    logical = turnout.route(logits, spec, turnout.Contract(ids_dtype=torch.int64), impl="reference")
    expert_map = torch.tensor([-1, 0, -1, 2, 3, -1, -1, 1, 4, -1, -1, -1], dtype=torch.int32, device=device)
    routing = routed(logits, spec, contract, expert_map=expert_map)
    want = expert_map.long()[logical.topk_ids]
    is_local = want >= 0
    assert torch.equal(routing.topk_ids.long(), torch.where(is_local, want, 5 if sentinel == "num_experts" else -1))
    torch.testing.assert_close(routing.topk_weights, torch.where(is_local, logical.topk_weights, 0.0))
    assert (routing.topk_weights[~is_local] == 0).all()


def test_a_map_with_ids_past_the_rank_s_experts_vllm_50845(routed, device):
    """13: entries of the map were checked for their sign alone."""
    contract = dataclasses.replace(CONTRACT, id_space="local", num_local_experts=4)
    spec = turnout.RouterSpec(num_experts=8, top_k=3, renormalize=True)
    expert_map = torch.tensor([0, 4, 1, 2**31 - 1, 2, -(2**31), 3, -1], dtype=torch.int32, device=device)
    routing = routed(make_logits("normal", 8, 8, device=device), spec, contract, expert_map=expert_map)
    assert set(routing.topk_ids.unique().tolist()) <= {-1, 0, 1, 2, 3}


def test_rows_are_routed_alike_with_structures_and_without(impl, device):
    """Bit for bit, whatever the batch: the launch that orders slots routes in other tiles."""
    spec = turnout.RouterSpec(num_experts=40, top_k=3)
    logits = every_kind_of_row(40, torch.float32, device)
    whole = turnout.route(logits, spec, CONTRACT, impl=impl)
    for row in (0, 7, len(logits) - 1):
        one = turnout.route(logits[row : row + 1], spec, CONTRACT, impl=impl)
        assert_bitwise_equal(one, turnout.Routing(whole.topk_weights[row : row + 1], whole.topk_ids[row : row + 1]))
