"""The models that ``turnout bench scenarios`` knows by name, and weights for those that come without any."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from turnout.bench.whole_model import GEMMA4_26B, POST_NORM
from turnout.testing.tiny import TINY_GEMMA4

# Gemma 4 at sizes that vLLM's attention and experts take on a CPU: few layers, and the 26B's routing at toy width.
FOUR_LAYERS: dict[str, Any] = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 128,
    "max_position_embeddings": 4096,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "enable_moe_block": True,
    "num_experts": 16,
    "top_k_experts": 4,
    "moe_intermediate_size": 128,
}
THIRTY_LAYERS: dict[str, Any] = {
    **FOUR_LAYERS,
    "num_hidden_layers": 30,
    "layer_types": GEMMA4_26B["layer_types"],
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 32,
}
DRAWN = {"gemma4-4-layers": FOUR_LAYERS, "gemma4-30-layers": THIRTY_LAYERS}
NAMES = ("tiny", *DRAWN, "gemma4-26b")
DEVIATION = 0.05  # of drawn weights: less, and nearly all tokens choose the same experts


class Checkpoint(NamedTuple):
    """A folder that an engine loads a model from."""

    folder: Path
    has_weights: bool  # else there is a config.json alone


def find_checkpoint(name: str, scratch: Path) -> Checkpoint:
    """The checkpoint of a model.

    Args:
        name: one of `NAMES`, or a folder.
        scratch: an empty folder, for a checkpoint that is made here.

    Raises:
        ValueError: neither a name nor a folder of a model.
    """
    if name == "tiny":
        return Checkpoint(TINY_GEMMA4, has_weights=True)
    if name in DRAWN:
        _draw_checkpoint(DRAWN[name], scratch)
        return Checkpoint(scratch, has_weights=True)
    if name == "gemma4-26b":
        _write_config(GEMMA4_26B, scratch)
        return Checkpoint(scratch, has_weights=False)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model must be one of {', '.join(NAMES)}, or a folder with a config.json; got {name!r}")
    return Checkpoint(folder, has_weights=any(folder.glob("*.safetensors")))


def read_vocab_size(checkpoint: Checkpoint) -> int:
    """How many ids of tokens there are."""
    config = json.loads((checkpoint.folder / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def _draw_checkpoint(fields: dict[str, Any], folder: Path) -> None:
    """Save a Gemma 4 with random weights in bfloat16."""
    try:
        from transformers import Gemma4ForCausalLM, Gemma4TextConfig
    except ModuleNotFoundError as error:
        raise ValueError("this model is made with transformers: pip install 'turnout[transformers]'") from error
    model_class: Any = Gemma4ForCausalLM
    model = model_class(Gemma4TextConfig(**fields)).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, DEVIATION, generator=generator)
            elif name.endswith("per_expert_scale"):
                parameter.uniform_(0.5, 1.5, generator=generator)
    model.save_pretrained(folder)


def _write_config(fields: dict[str, Any], folder: Path) -> None:
    config = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "dtype": "bfloat16", **fields}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Give a model without a checkpoint weights that route evenly, in place, from a fixed seed.

    An engine's dummy weights are as small in the norms as elsewhere, and each layer scales its output by one of them:
    hidden states vanish after a few layers, and all tokens choose the same experts. Quantised weights are left alone.
    """
    generators: dict[torch.device, torch.Generator] = {}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    is_buffer = {name for name, _ in model.named_buffers()}
    for name, tensor in tensors.items():
        is_weight = name not in is_buffer or name.endswith("layer_scalar")
        if not is_weight or tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            continue
        generator = generators.setdefault(tensor.device, torch.Generator(tensor.device).manual_seed(0))
        _draw(name, tensor, generator)


def _draw(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    if tensor.dim() > 1:
        is_router = name.endswith(("router.proj.weight", "gate.weight"))
        tensor.normal_(0, 1.0 if is_router else 1 / math.sqrt(tensor.shape[-1]), generator=generator)
    elif name.endswith("per_expert_scale"):
        tensor.uniform_(0.5, 1.5, generator=generator)
    elif name.endswith("bias"):
        tensor.zero_()
    else:  # norms, and scales of one value for each channel or layer
        tensor.fill_(POST_NORM if _follows_a_sublayer(name) else 1.0)


def _follows_a_sublayer(name: str) -> bool:
    return name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"))
