"""The blocks of slots that ``grouped`` works on, for plain and for quantised weights."""

from __future__ import annotations

import functools
from collections.abc import Container

from turnout.contracts import PADDED_BLOCK_MAP, Contract
from turnout.experts.tuning import block_size
from turnout.permutation import triton as permutation
from turnout.permutation.ops import allocate, permutation_of
from turnout.types import Permutation, Routing


def block_map(routing: Routing, num_experts: int, usable: Container[int], rows: int | None = None) -> Permutation:
    """The padded block map of ``routing`` if it is whole and of blocks that can be used, else a new one.

    Args:
        routing: with or without a map.
        num_experts: E.
        usable: slots of a block for which there is a tile.
        rows: slots of a block, no other will do; None: any that is usable.
    """
    given = routing.permutation
    is_whole = all(getattr(given, name) is not None for name in PADDED_BLOCK_MAP)
    if is_whole and rows_of(given) in (usable if rows is None else (rows,)):
        return given
    top_k = routing.topk_ids.shape[1]
    contract = _contract(rows or block_size(routing.topk_ids.numel(), num_experts))
    blocks = permutation_of(allocate(routing.topk_ids, top_k, num_experts, contract), contract)
    permutation.launch(routing.topk_ids, None, num_experts, contract, blocks)
    return blocks


def rows_of(blocks: Permutation) -> int:
    """Slots of a block of a map that is whole; 0 if it has no blocks."""
    assert blocks.sorted_token_ids is not None, "the map is whole"
    assert blocks.expert_ids is not None, "the map is whole"
    return blocks.sorted_token_ids.numel() // max(1, blocks.expert_ids.numel())


@functools.cache
def _contract(rows: int) -> Contract:
    return Contract(structures=PADDED_BLOCK_MAP, block_size=rows)
