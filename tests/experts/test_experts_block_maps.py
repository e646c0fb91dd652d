"""The padded block map that grouped experts read: any size of block, either dtype, tiles that pass an expert's end."""

import pytest
import torch

import turnout
from turnout.contracts import PADDED_BLOCK_MAP
from turnout.testing.experts import ExpertsCase, assert_within_tolerance, oracle, plain_run

grouped = pytest.importorskip("turnout.experts.grouped", reason="triton is not installed")
# No expert's rows are a multiple of any tile's: each last tile reaches into up, or into the next expert.
CASE = ExpertsCase(
    num_tokens=7, num_experts=5, top_k=2, routing="empty_experts", hidden_size=48, intermediate_size=40, spec="silu"
)


def with_map(inputs, topk_ids, block_size, dtype=torch.int32):
    """The routing of the inputs, with the map of these ids."""
    contract = turnout.Contract(structures=PADDED_BLOCK_MAP, block_size=block_size, structures_dtype=dtype)
    return turnout.Routing(*inputs.routing[:2], *turnout.permute(topk_ids, CASE.num_experts, contract))


def run(inputs, routing, weights=None):
    weights = inputs.weights if weights is None else weights
    return turnout.experts(inputs.hidden_states, weights, routing, inputs.spec, impl="grouped")


@pytest.mark.parametrize("structures_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("block_size", [8, *grouped.GATE_UP_TILES, 256])
def test_tiles_past_an_experts_end_bring_nothing_of_the_next(block_size, structures_dtype, kernel_device, monkeypatch):
    """Experts that nobody chose hold NaN. Large blocks read weights through descriptors, which know no experts."""
    inputs = CASE.make(kernel_device)
    unused = torch.ones(CASE.num_experts, dtype=torch.bool, device=kernel_device)
    unused[inputs.routing.topk_ids.long().flatten()] = False
    assert (~unused[:-1] & unused[1:]).any(), "an expert that is chosen stands before one that is not"
    weights = [None if weight is None else weight.clone() for weight in inputs.weights]
    for weight in weights[:2]:
        weight[unused] = float("nan")
    through_descriptors, argument = [], grouped._weight_argument

    def seen(*given):
        through_descriptors.append(argument(*given)[1])
        return argument(*given)

    monkeypatch.setattr(grouped, "_weight_argument", seen)
    routing = with_map(inputs, inputs.routing.topk_ids, block_size, structures_dtype)
    out = run(inputs, routing, turnout.ExpertsWeights(*weights))
    assert through_descriptors == [block_size in (64, 128)] * 2
    assert_within_tolerance(out, oracle(inputs), plain_run(inputs))


@pytest.mark.parametrize(("block_size", "is_read"), [(8, False), (16, True), (128, True), (256, False)])
def test_a_map_is_read_if_there_is_a_tile_for_its_blocks(block_size, is_read, kernel_device):
    """It says something else than the ids: the result follows the map, or one that is made anew."""
    inputs = CASE.make(kernel_device)
    twos = torch.full_like(inputs.routing.topk_ids, 2)
    as_said = turnout.Routing(inputs.routing.topk_weights, twos if is_read else inputs.routing.topk_ids)
    out = run(inputs, with_map(inputs, twos, block_size))
    torch.testing.assert_close(out, run(inputs, as_said), rtol=1e-5, atol=1e-6)
