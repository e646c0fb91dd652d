"""Runs a causal language model step by step."""

from __future__ import annotations

from typing import Any

import torch


class Steps:
    """One generation: a prompt of random ids, then greedy single-token steps on the model's own cache.

    Args:
        model: a transformers-style causal model.
        prefill: prompt tokens per sequence.
        concurrency: sequences in the batch.
    """

    def __init__(self, model: torch.nn.Module, *, prefill: int, concurrency: int) -> None:
        self._model: Any = model
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, _vocab_size(model), (concurrency, prefill), generator=generator)
        self._ids = ids.to(next(model.parameters()).device)
        self._cache: Any = None

    def first(self) -> Any:
        """The prompt, all at once."""
        return self._step()

    def next(self) -> Any:
        """The next token of every sequence."""
        return self._step()

    def _step(self) -> Any:
        out = self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        self._ids = out.logits[:, -1:].argmax(-1)  # [concurrency, 1] int64
        return out


def _vocab_size(model: torch.nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{type(model).__name__} has no config.vocab_size: it is not a causal language model; "
                         "audit it as a callable, with its inputs")  # fmt: skip
    return size
