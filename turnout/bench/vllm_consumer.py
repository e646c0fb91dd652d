"""The case of vLLM's pull request 40565: experts that read int64 ids, emulated around those that are there.

vllm-xpu-kernels before v0.1.8 read int64 ids, and its Python part cast others on every call. None of its kernels
runs without an Intel GPU, so the cast is put in front of the experts that run here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from turnout.contracts import contracts

CONSUMER = "xpu.remap_hidden_states.before_0.1.8"
"""Its name in `turnout.contracts`."""


def emulate_int64_consumer(layers: Iterable[Any], device: torch.device) -> None:
    """Let the experts of each layer read int64 ids from now on, whatever routes."""
    hand_on = _low_words if device.type == "cpu" else _as_it_is
    for layer in layers:
        experts = layer.routed_experts
        experts.forward_modular = _reading_int64(experts.forward_modular, hand_on)


def declare(layers: Iterable[Any], is_declared: bool) -> None:
    """Have each layer's dispatcher declare what the emulated consumer reads, or nothing, as vLLM's do on one node."""
    ids_dtype = contracts[CONSUMER].ids_dtype if is_declared else None
    for layer in layers:
        layer.routed_experts.quant_method.moe_kernel.prepare_finalize.topk_indices_dtype = lambda: ids_dtype


def _reading_int64(forward: Any, hand_on: Any) -> Any:
    def forward_modular(*, topk_ids: torch.Tensor, **others: Any) -> Any:
        topk_ids = topk_ids.to(torch.int64)  # returns int64 ids as they are
        return forward(topk_ids=hand_on(topk_ids), **others)

    return forward_modular


def _as_it_is(topk_ids: torch.Tensor) -> torch.Tensor:
    return topk_ids  # the experts on CUDA take int64


def _low_words(topk_ids: torch.Tensor) -> torch.Tensor:
    """Int32 ids for the experts on a CPU, which take nothing else: a copy in every variant, and no cast."""
    return topk_ids.view(torch.int32)[:, ::2].contiguous()
