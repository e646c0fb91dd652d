"""The weights of the selected experts of a tile of rows."""

import triton
import triton.language as tl

from turnout.device.rounding import round_to, widened
from turnout.device.scores import scores, sigmoid
from turnout.device.softmax import tree_sum, unnormalized_softmax


@triton.jit
def softmax_shares(
    selected,
    values,
    best,
    is_slot,
    is_expert,
    RECIPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The softmax of the selected values among themselves, or among all."""
    mass = tl.where(is_slot, unnormalized_softmax(selected, best), 0.0)
    if RECIPE.shares_among_selected:
        total = tree_sum(mass, BLOCK_T, BLOCK_K)
    else:
        everyone = unnormalized_softmax(values, best)
        total = tree_sum(tl.where(is_expert, everyone, 0.0), BLOCK_T, BLOCK_E)
        total = tl.where(best == float("-inf"), RECIPE.top_k, total)  # nothing but -inf: K equal shares
    return tl.div_rn(mass, tl.broadcast_to(total, [BLOCK_T, BLOCK_K]))


@triton.jit
def selected_scores(
    selected, best, total, is_slot, RECIPE: tl.constexpr, SCORES: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The scores of the selected values, normalised where the spec says so."""
    weights = sigmoid(selected) if RECIPE.selected_score == "sigmoid" else scores(selected, best, total, RECIPE, SCORES)
    if RECIPE.renormalize:
        weights = normalized(tl.where(is_slot, weights, 0.0), RECIPE, BLOCK_T, BLOCK_K)
    return weights


@triton.jit
def normalized(weights, RECIPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights divided by their sum; where nothing has any weight, all K share equally."""
    total = tree_sum(weights, BLOCK_T, BLOCK_K) + RECIPE.renormalize_eps
    total = tl.maximum(total, RECIPE.renormalize_min)
    total = tl.broadcast_to(total, [BLOCK_T, BLOCK_K])
    return tl.where(total == 0.0, 1.0 / RECIPE.top_k, tl.div_rn(weights, tl.where(total == 0.0, 1.0, total)))


@triton.jit
def scaled(weights, scale_ptr, ids, is_slot, RECIPE: tl.constexpr, LOGITS: tl.constexpr):
    """Weights times what the spec names, rounded as the model rounds them."""
    if scale_ptr is not None:
        weights = weights * widened(tl.load(scale_ptr + ids, mask=is_slot, other=0.0))
    weights = weights * RECIPE.routed_scaling_factor
    if RECIPE.divide_by_top_k:
        weights = tl.div_rn(weights, 1.0 * RECIPE.top_k)
    return round_to(weights, LOGITS if RECIPE.rounds_weights else tl.float32)
