"""Gemma 4 in transformers, stock and with turnout, as runners of scenarios."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turnout.bench.scenarios import Scenario
from turnout.testing.bits_per_byte import bits_per_byte

BITS_PER_BYTE_CHARACTERS = 4096


def read_config(name: str) -> Any:
    """The text config of a Gemma 4 with Mixture-of-Experts layers, to be refused before its weights are read.

    Args:
        name: a checkpoint's folder, or its id on the Hugging Face hub.

    Raises:
        ValueError: no such checkpoint, or another kind of model.
    """
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise ValueError("turnout demo needs transformers: pip install 'turnout[transformers]'") from error
    if name.startswith((".", "/")) and not Path(name).exists():
        raise ValueError(f"there is no checkpoint folder {name!r}; pass a folder that exists, or a hub id")
    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"transformers cannot load {name!r}: {_first_sentence(error)}") from error
    if config.model_type != "gemma4_text":
        raise ValueError(f"{name!r} is a {config.model_type} model; pass a Gemma 4 with Mixture-of-Experts layers")
    if not config.enable_moe_block:
        raise ValueError(f"{name!r} is a Gemma 4 without Mixture-of-Experts layers, so there is no routing to compare")
    return config


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a stock model.

    Raises:
        ValueError: its weights cannot be found.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except OSError as error:
        raise ValueError(f"transformers cannot load {name!r}: {_first_sentence(error)}") from error
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any | None:
    """The checkpoint's tokenizer; None if it has none.

    Raises:
        ValueError: it has one that transformers cannot load.
    """
    from transformers import AutoTokenizer

    folder = Path(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if folder.is_dir() and any(folder.glob("tokenizer*")):
            raise ValueError(f"transformers cannot load the tokenizer of {name!r}: {_first_sentence(error)}") from error
        return None


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


def twin_of(model: nn.Module) -> Any:
    """A second model over the same parameters and buffers, so that one can be changed and one stay stock."""
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def make_prompts(tokenizer: Any | None, text: str, *, requests: int, tokens: int, vocab_size: int) -> torch.Tensor:
    """Prompts of equal length, each reading the text from a place of its own, round its end to the start.

    Args:
        tokenizer: of the model; None: the prompts are random ids, from a fixed seed.
        text: what the prompts are cut from.
        requests: number of prompts, R.
        tokens: length of each, P.
        vocab_size: range of random ids.

    Returns:
        [R, P] int64 on the CPU.

    Raises:
        ValueError: the text is too short.
    """
    if tokenizer is None:
        return torch.randint(vocab_size, (requests, tokens), generator=torch.Generator().manual_seed(0))
    starts = [i * len(text) // requests for i in range(requests)]
    ids = [tokenizer(text[start:] + text[:start], truncation=True, max_length=tokens).input_ids for start in starts]
    if len(ids[0]) < tokens:
        raise ValueError(f"the held-out text has {len(ids[0])} tokens, and each prompt wants {tokens}; lower --prefill")
    return torch.tensor(ids)


class Variant:
    """One way to run the model: stock or with turnout, eager or compiled.

    Attributes:
        model: the model; variants of one kind may share it.
        forward: what to call: the model, or its compiled form.
        is_compiled: whether it is compiled.
        warm_up_forwards: how many forwards differ from all later ones.
    """

    def __init__(self, model: Any, *, is_compiled: bool = False) -> None:
        self.model = model
        self.is_compiled = is_compiled
        # An eager forward compiles kernels; a compiled one may compile twice, and records a device graph at the third.
        self.warm_up_forwards = 3 if is_compiled else 1
        self.forward = model
        if is_compiled:
            # transformers' generate() compiles decode in this mode too; on a CPU there are no device graphs.
            mode = "default" if model.device.type == "cpu" else "reduce-overhead"
            self.forward = torch.compile(model, fullgraph=True, mode=mode)
        self._experts = model.config.get_text_config()._experts_implementation

    def use_experts(self, phase: str) -> None:
        """Select the experts implementation that `generate` would: off the CPU, it decodes with batched_mm."""
        swap = phase == "decode" and self._experts == "grouped_mm" and self.model.device.type != "cpu"
        self.model.set_experts_implementation("batched_mm" if swap else self._experts)

    def empty_cache(self, used: Any, prompts: torch.Tensor, steps: int) -> Any:
        """An empty cache for the prompts and some decode steps, as `generate` takes: static if compiled.

        Args:
            used: the cache of the last round, or None. A static one is emptied in place, since compiled code
                knows the addresses of its tensors.
            prompts: [R, P] int64.
            steps: decode steps after the prompts.
        """
        from transformers import DynamicCache, StaticCache

        if not self.is_compiled:
            return DynamicCache(config=self.model.config)
        if used is None:
            used = StaticCache(config=self.model.config, max_cache_len=prompts.shape[1] + steps)
            self.use_experts("prefill")
            self.model(input_ids=prompts, past_key_values=used)  # allocates its tensors
        used.reset()
        return used

    def runner(self, scenario: Scenario, prompts: torch.Tensor) -> Prefill | Decode:
        """The runner of a scenario; ``prompts`` is [requests, prompt_tokens] on the model's device."""
        return (Prefill if scenario.phase == "prefill" else Decode)(self, prompts, scenario.forwards)

    def bits_per_byte(self, tokenizer: Any, text: str) -> float:
        """Bits per byte on the first `BITS_PER_BYTE_CHARACTERS` of a text."""
        text = text[:BITS_PER_BYTE_CHARACTERS]
        tokens = torch.tensor(tokenizer(text).input_ids, device=self.model.device)
        self.use_experts("prefill")
        return bits_per_byte(self.forward, tokens, num_bytes=len(text.encode()))


class Prefill:
    """Runs the prompts through the model, into an empty cache."""

    def __init__(self, variant: Variant, prompts: torch.Tensor, steps: int) -> None:
        self._variant, self._prompts, self._steps = variant, prompts, steps
        self.warm_up_forwards = variant.warm_up_forwards
        self._cache: Any = None

    def prepare(self) -> None:
        """Empty the cache."""
        self._cache = self._variant.empty_cache(self._cache, self._prompts, self._steps)
        self._variant.use_experts("prefill")

    def forward(self) -> None:
        """One forward over all prompts; of the logits only the last position's."""
        self._variant.forward(input_ids=self._prompts, past_key_values=self._cache, logits_to_keep=1)


class Decode:
    """Greedy decode on a filled cache: a step is one forward and one argmax, `generate` without its checks.

    Attributes:
        tokens: [R, 1] int64 each: the token that follows the prompts, then one for each step since `prepare`.
        warm_up_forwards: how many forwards differ from all later ones.
    """

    def __init__(self, variant: Variant, prompts: torch.Tensor, steps: int) -> None:
        self._variant, self._prompts, self._steps = variant, prompts, steps
        self.warm_up_forwards = variant.warm_up_forwards
        self._cache: Any = None
        self._filled: Any = None  # a cache that holds the prompts
        self.tokens: list[torch.Tensor] = []
        self._positions = torch.arange(prompts.shape[1] + steps, device=prompts.device)[None]
        self._is_token = torch.ones_like(self._positions).repeat(len(prompts), 1)

    @torch.no_grad()
    def prepare(self) -> None:
        """Have the prompts in the cache: an eager one is copied from the first, compiled code wants its own again."""
        if self._filled is None or self._variant.is_compiled:
            self._filled = self._variant.empty_cache(self._filled, self._prompts, self._steps)
            self._variant.use_experts("prefill")
            logits = self._logits(self._variant.model, input_ids=self._prompts, past_key_values=self._filled)
            self._first = logits.argmax(-1, keepdim=True)
        self._cache = self._filled if self._variant.is_compiled else copy.deepcopy(self._filled)
        self.tokens = [self._first]
        self._variant.use_experts("decode")

    def forward(self) -> None:
        """One step for every request."""
        self.tokens.append(self.logits().argmax(-1, keepdim=True))

    def logits(self) -> torch.Tensor:
        """Logits [R, V] of what follows the last of `tokens`, which goes into the cache."""
        return self._logits(self._variant.forward, **self._inputs())

    def _inputs(self) -> dict[str, Any]:
        """What `generate` passes: for a static cache positions and masks, too, made outside of compiled code.

        Left to the model, they would bring the number of the step into the graph, and each step would be recorded anew.
        """
        inputs = {"input_ids": self.tokens[-1], "past_key_values": self._cache}
        if self._variant.is_compiled:
            seen = self._prompts.shape[1] + len(self.tokens)
            inputs = self._variant.model.prepare_inputs_for_generation(
                **inputs, position_ids=self._positions[:, seen - 1 : seen], attention_mask=self._is_token[:, :seen]
            )
        return inputs

    def _logits(self, forward: Any, **inputs: Any) -> torch.Tensor:
        logits: torch.Tensor = forward(**inputs, logits_to_keep=1).logits
        return logits[:, -1]


@torch.no_grad()
def decoded_tokens(variant: Variant, prompts: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy continuation of each prompt, [R, 1 + steps] int64."""
    decode = Decode(variant, prompts, steps)
    decode.prepare()
    for _ in range(steps):
        decode.forward()
    return torch.cat(decode.tokens, dim=1)
