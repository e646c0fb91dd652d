"""The tiny Gemma 4 that ships with turnout: a trained byte-level model, and text it was never shown."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

TINY_GEMMA4 = Path(str(files("turnout").joinpath("assets", "tiny_gemma4")))
"""Folder of the checkpoint; ``from_pretrained`` of a stock transformers loads model and tokenizer from it.

Made by ``scripts/train_tiny_gemma4.py``; its ``training.json`` says how, and how well it does. That experts are
loaded as unevenly as they are (the busiest with 3.7 to 4.4 times its layer's mean) is not chance: training pushes
for it.
"""


def held_out_text() -> str:
    """Return 64 KB (65536 bytes in UTF-8) of Python's standard library, from files that training left out."""
    return (TINY_GEMMA4 / "held_out.txt").read_bytes().decode("utf-8")


def load_tiny_gemma4(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """Load the tiny Gemma 4.

    Args:
        dtype: dtype of the weights; they were rounded to bfloat16, so float32 holds the same values.
        **kwargs: passed on to ``Gemma4ForCausalLM.from_pretrained``, ``experts_implementation`` for one.

    Returns:
        A stock ``transformers.Gemma4ForCausalLM``, in evaluation mode.
    """
    from transformers import Gemma4ForCausalLM

    return Gemma4ForCausalLM.from_pretrained(TINY_GEMMA4, dtype=dtype, **kwargs)
