"""Models that the command line knows by name, and those that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from turnout.machine import find_device

_SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def tiny_mixtral(dtype: torch.dtype, **changes: Any) -> torch.nn.Module:
    """A small Mixtral with random weights: 4 layers, 8 experts, top-2."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return _built(MixtralForCausalLM, MixtralConfig(**{**_SMALL, "num_local_experts": 8, **changes}), dtype)


def tiny_qwen3_moe(dtype: torch.dtype, **changes: Any) -> torch.nn.Module:
    """A small Qwen3 MoE with random weights: 4 layers, 16 experts, top-4."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    moe = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return _built(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**_SMALL, **moe, **changes}), dtype)


def small_gemma4(dtype: torch.dtype, **changes: Any) -> torch.nn.Module:
    """A small Gemma 4 with random weights: 4 layers (3 sliding, 1 full), 16 experts, top-4."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    own = {
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 32,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 512,
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": 64,
        "final_logit_softcapping": 30.0,
    }
    values = {**_SMALL, **own, **changes}
    layers = values["num_hidden_layers"]
    values["layer_types"] = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    return _built(Gemma4ForCausalLM, Gemma4TextConfig(**values), dtype)


def tiny_gemma4(dtype: torch.dtype) -> torch.nn.Module:
    """The trained checkpoint that ships with turnout."""
    from turnout.testing.tiny import load_tiny_gemma4

    model: torch.nn.Module = load_tiny_gemma4(dtype=dtype)
    return model.eval()


NAMED: dict[str, Callable[[torch.dtype], torch.nn.Module]] = {
    "tiny": tiny_gemma4,
    "tiny-mixtral": tiny_mixtral,
    "tiny-qwen3-moe": tiny_qwen3_moe,
}
"""Names that `load` takes beside folders and model ids."""


def load(name: str, *, dtype: torch.dtype, device: str = "cpu", experts: str | None = None) -> torch.nn.Module:
    """Load a causal language model for an audit.

    Args:
        name: one of `NAMED`, a checkpoint folder, or a model id.
        dtype: of the weights.
        device: where to put it.
        experts: a transformers experts implementation, such as "grouped_mm"; None for the model's own choice.

    Raises:
        ValueError: no such model, no such device here, or no such experts implementation.
    """
    find_device(device)
    model: Any = NAMED[name](dtype) if name in NAMED else _from_pretrained(name, dtype)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _built(cls: Any, config: Any, dtype: torch.dtype) -> torch.nn.Module:
    model: torch.nn.Module = cls._from_config(config, dtype=dtype)
    return model.eval()


def _from_pretrained(name: str, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        kind = "folder" if Path(name).exists() else "model"
        names = ", ".join(NAMED)
        raise ValueError(
            f"could not load the {kind} {name!r} with transformers ({str(error).splitlines()[0]}); pass a checkpoint "
            f"folder, a model id that is in the cache or can be downloaded, or one of: {names}"
        ) from error
    return model
