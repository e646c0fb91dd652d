"""Bits per byte: the loss of a language model in a unit that does not depend on its tokenizer."""

import math

import torch
from torch import nn
from torch.nn import functional as F


@torch.inference_mode()
def bits_per_byte(model: nn.Module, tokens: torch.Tensor, window: int = 512, *, num_bytes: int | None = None) -> float:
    """Measure how well a causal language model predicts a text.

    Every token but the first is predicted exactly once. The model is called once per window of predictions,
    without memory of earlier windows: the first prediction of a window sees one token, the last ``window``.

    Args:
        model: a causal language model in the manner of transformers: called as
            ``model(input_ids=[1, W], use_cache=False)``, it returns an object with ``logits`` ``[1, W, V]``.
        tokens: ``[N + 1]`` int64 on the model's device, the ids of one text; the first is context only (a BOS
            token, as a rule).
        window: number of tokens predicted per call, W.
        num_bytes: length in UTF-8 bytes of what the N predicted tokens spell. Left out, it is N: right for a
            tokenizer that gives each byte its own token.

    Returns:
        Bits per byte: the negative log-likelihood of the N tokens to base 2, over ``num_bytes``.

    Raises:
        ValueError: if ``tokens`` is not a vector of at least two int64 ids, or ``window`` or ``num_bytes`` is
            less than one.
    """
    if tokens.dim() != 1 or tokens.dtype != torch.int64 or tokens.numel() < 2:
        raise ValueError(
            f"tokens must be a vector of at least two int64 ids, got {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}; pass one text at a time, with a BOS token in front"
        )
    num_predicted = tokens.numel() - 1
    num_bytes = num_predicted if num_bytes is None else num_bytes
    if window < 1 or num_bytes < 1:
        raise ValueError(f"window and num_bytes must be at least 1, got {window} and {num_bytes}; both have defaults")

    nats = 0.0
    for start in range(0, num_predicted, window):
        piece = tokens[start : start + window + 1]  # the last token predicted is the next piece's first input
        logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0]  # [W, V]
        nats += F.cross_entropy(logits.float(), piece[1:], reduction="sum").item()
    return nats / math.log(2) / num_bytes
