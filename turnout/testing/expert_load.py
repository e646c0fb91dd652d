"""Expert load: how many tokens a model's routers send to each expert."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


def _count(counts: torch.Tensor, _router: nn.Module, _args: Any, output: tuple[torch.Tensor, ...]) -> None:
    """Forward hook of a router: add the third of its results, topk_ids ``[T, K]``, to ``counts`` ``[E]``."""
    counts += torch.bincount(output[2].flatten(), minlength=len(counts)).cpu()


@contextmanager
def tokens_per_expert(model: nn.Module) -> Iterator[torch.Tensor]:
    """Count what each router of a Gemma 4 model selects, for as long as the context lasts.

    Args:
        model: a Gemma 4 MoE model of transformers. Its routers are the modules named ``router``; each returns
            (router probabilities ``[T, E]``, topk_weights ``[T, K]``, topk_ids ``[T, K]``).

    Yields:
        ``[L, E]`` int64 on the CPU, one row per MoE layer in the model's order: zeros that each forward pass
        inside the context adds to. A row sums to K times the number of tokens seen.

    Raises:
        ValueError: if the model has no router.
    """
    routers: list[Any] = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "router"]
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no module named 'router': pass a Gemma 4 with enable_moe_block=True"
        )
    counts = torch.zeros(len(routers), routers[0].per_expert_scale.numel(), dtype=torch.int64)
    hooks = [m.register_forward_hook(partial(_count, row)) for m, row in zip(routers, counts, strict=True)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
