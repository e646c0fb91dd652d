"""The routing benchmark times nothing that is wrong."""

import pytest
import torch

import turnout
from turnout.bench.routing import check, table

SPEC = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)


def routed(num_tokens):
    logits = torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(0))
    return logits, turnout.route(logits, SPEC, turnout.Contract(ids_dtype=torch.int64), impl="reference")


@pytest.mark.parametrize("num_tokens", [1, 4096])
@pytest.mark.parametrize(
    "spoil", [lambda w: w + 1e-3, lambda w: torch.full_like(w, float("nan")), lambda w: w.roll(1, dims=1)]
)
def test_a_wrong_variant_is_refused(num_tokens, spoil):
    logits, right = routed(num_tokens)
    check("right", right, right, logits)
    with pytest.raises(RuntimeError, match=f"spoilt is wrong in {num_tokens} of {num_tokens} rows; it is not timed"):
        check("spoilt", (spoil(right.topk_weights), right.topk_ids), right, logits)


def test_other_experts_are_refused_unless_they_tie():
    logits, right = routed(8)
    lowest = logits.argmin(dim=1)
    other = torch.cat([right.topk_ids[:, :3], lowest[:, None]], dim=1)
    with pytest.raises(RuntimeError, match="wrong in 8 of 8"):
        check("other", (right.topk_weights, other), right, logits)
    tied = logits.scatter(1, lowest[:, None], logits.gather(1, right.topk_ids[:, 3:]))
    expected = turnout.route(tied, SPEC, turnout.Contract(ids_dtype=torch.int64), impl="reference")
    swapped = torch.where(expected.topk_ids[:, 3:] == lowest[:, None], right.topk_ids[:, 3:], lowest[:, None])
    check("tied", (expected.topk_weights, torch.cat([expected.topk_ids[:, :3], swapped], dim=1)), expected, tied)


def test_the_table_shows_every_row_and_variant():
    row = {"num_tokens": 1, "floor_us": 0.1, "a": [1.0, 0.9, 1.1], "b": [2.0, 1.9, 2.1]}
    printed = table({"rows": [row], "host": {"route": [3.0, 2.9, 3.1]}})
    assert "| 1 | 1.00 | 2.00 | 0.10 |" in printed
    assert "route 3.0 us" in printed
