"""Train the tiny Gemma 4 that ships with turnout, on the source text of Python's standard library.

    python scripts/train_tiny_gemma4.py --device cuda     # about six minutes on one NVIDIA H200
    python scripts/train_tiny_gemma4.py --check           # measure the shipped checkpoint again

The result is a folder that a stock ``from_pretrained`` loads: bfloat16 weights and a tokenizer with one token
per byte. Beside them lie 64 KB of held-out text, and how the model was made and does in ``training.json``.
"""

import hashlib
import json
import math
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, processors
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from turnout.testing.bits_per_byte import bits_per_byte
from turnout.testing.expert_load import tokens_per_expert
from turnout.testing.tiny import TINY_GEMMA4

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0 to 3; byte b has id 4 + b
PAD, EOS, BOS = range(3)
FIRST_BYTE = len(SPECIAL_TOKENS)

HELD_OUT_BYTES = 65536
HELD_OUT_BYTES_PER_FILE = 8192  # so that no single file decides the score
HELD_OUT_ONE_IN = 16  # files

MAX_CHECKPOINT_BYTES = 8_000_000
MAX_BITS_PER_BYTE = 2.2
MIN_BUSIEST_OVER_MEAN = 3.0

PEAK_LEARNING_RATE = 3e-3
WARMUP = 0.02  # of the run
# Loads are multiples of a layer's mean.
STARVING = 0.1  # every expert is helped up to this load
CROWDED = 4.0  # and the busiest of each layer up to this one
LOAD_PENALTY = 0.01  # weight in the loss


def read_corpus() -> tuple[list[bytes], bytes]:
    """Read the running interpreter's standard library.

    A hash of its path decides on which side a file falls, so the split is the same on every machine.
    Tests are left out because many distributions do not install them; encodings, because its hundred tables are
    nearly one and the same, and a held-out one is as good as trained on.

    Returns:
        The files to train on, and 65536 bytes of UTF-8 text from the start of files that are not among them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    training, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata describes the machine that built Python, not the language
        if skipped.intersection(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        text = path.read_bytes()
        if not text:  # many an __init__.py
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        if int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN:
            training.append(text)
        elif text.isascii():  # cut anywhere, ASCII is still valid UTF-8
            held_out.append((digest, text[:HELD_OUT_BYTES_PER_FILE]))
    excerpt = b"".join(text for _, text in sorted(held_out))[:HELD_OUT_BYTES]
    if len(excerpt) < HELD_OUT_BYTES:
        raise ValueError(
            f"{root} yields {len(excerpt)} bytes of held-out text where {HELD_OUT_BYTES} are wanted; "
            "run with a Python that has its whole standard library"
        )
    return training, excerpt


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes: its vocabulary has no character, so each falls back to its UTF-8 bytes."""
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template="{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    )


def build_model() -> Gemma4ForCausalLM:
    """Build Gemma 4 26B-A4B in small: five sliding layers and a full one with keys as values; all MoE."""
    config = Gemma4TextConfig(
        vocab_size=288,  # 260 tokens, padded to a multiple of 32
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        global_head_dim=64,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=128,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=288,
        enable_moe_block=True,
        num_experts=32,
        top_k_experts=4,
        moe_intermediate_size=32,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        initializer_range=0.09,  # about H^-0.5: the usual 0.02 suits wider models
        max_position_embeddings=4096,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        architectures=["Gemma4ForCausalLM"],
    )
    model = Gemma4ForCausalLM(config)
    for layer in model.model.layers:
        # The router divides by sqrt(H): unit weights give logits of unit variance, so tokens part early.
        nn.init.normal_(layer.router.proj.weight)
    return model


def every_expert_forward(
    experts: Any, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """Run every expert on every token, and weight the ones not selected by zero.

    At this size two dense products cost less than sorting the tokens by expert. An expert without a token
    gets a gradient of exactly zero; torch's grouped_mm leaves garbage on some GPUs (pytorch issue 172439).
    """
    weights = hidden_states.new_zeros(len(hidden_states), experts.num_experts)
    weights = weights.scatter(1, topk_ids, topk_weights.to(hidden_states.dtype))  # [T, E]
    gate_up = F.linear(hidden_states, experts.gate_up_proj.flatten(0, 1))  # [T, E * 2I]
    gate, up = gate_up.view(len(hidden_states), experts.num_experts, -1).chunk(2, dim=-1)  # [T, E, I]
    activated = experts.act_fn(gate) * up * weights[..., None]
    return F.linear(activated.flatten(1), experts.down_proj.transpose(0, 1).flatten(1))  # [T, H]


def relative_load(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Load of each expert ``[E]`` as a multiple of the mean, from ``topk_ids`` ``[T, K]``."""
    return torch.bincount(topk_ids.flatten(), minlength=num_experts) * (num_experts / topk_ids.numel())


def load_penalty(router_probabilities: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """Push up the logits of experts that lack load: the starving ones, and the busiest until it is crowded.

    Uneven load is wanted, as real models have it, and dead experts are not: an expert that no token selects gets no
    gradient from the prediction loss. The logarithm keeps the push on a logit steady; on the probability itself the
    push would fade with it.

    Args:
        router_probabilities: ``[T, E]`` float32.
        topk_ids: ``[T, K]`` int64.

    Returns:
        A scalar, zero once no expert lacks load.
    """
    load = relative_load(topk_ids, router_probabilities.shape[1])
    floor = torch.full_like(load, STARVING).scatter(0, load.argmax(keepdim=True), CROWDED)
    lack = (floor - load).clamp(min=0) / floor  # [E]
    return -(lack * router_probabilities.clamp(min=1e-9).log().mean(0)).sum()


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; ``progress`` runs from 0 to 1."""
    if progress < WARMUP:
        return PEAK_LEARNING_RATE * progress / WARMUP
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW on float32 weights; norms and scales, the vectors, are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def token_stream(texts: list[bytes]) -> torch.Tensor:
    """Join all files to one vector ``[N]`` of int16 token ids, each file between BOS and EOS."""
    edges = torch.tensor([BOS, EOS], dtype=torch.int16)
    pieces = []
    for text in texts:
        ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int16) + FIRST_BYTE
        pieces += [edges[:1], ids, edges[1:]]
    return torch.cat(pieces)


def next_token_loss(model: nn.Module, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Mean nats per token of ``tokens`` ``[B, L + 1]``, computed in ``dtype`` from float32 weights."""
    weights = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
    inputs = {"input_ids": tokens[:, :-1], "use_cache": False}
    logits = functional_call(model, weights, kwargs=inputs).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def train(
    model: Gemma4ForCausalLM, stream: torch.Tensor, batch: int, length: int, minutes: float, steps: int | None
) -> dict[str, Any]:
    """Train in place, in float32 on a CPU and with bfloat16 copies of the weights on an accelerator.

    Args:
        model: float32 weights, on the device to train on.
        stream: ``[N]`` int16 token ids, on the same device.
        batch: sequences per step.
        length: tokens per sequence.
        minutes: how long to train; ignored where ``steps`` is given.
        steps: how many steps to train, for a run that can be repeated.

    Returns:
        What was done: steps, tokens, seconds.
    """
    dtype = torch.float32 if stream.device.type == "cpu" else torch.bfloat16
    routed: list[tuple[torch.Tensor, ...]] = []
    for layer in model.model.layers:
        layer.router.register_forward_hook(lambda _router, _args, output: routed.append(output))
    optimizer = build_optimizer(model)
    window = torch.arange(length + 1)
    start, step, progress, reported = time.monotonic(), 0, 0.0, 0.0
    while progress < 1:
        tokens = stream[(torch.randint(len(stream) - length, (batch, 1)) + window).to(stream.device)].long()
        routed.clear()
        loss = next_token_loss(model, tokens, dtype)
        penalty = sum(load_penalty(probabilities, topk_ids) for probabilities, _, topk_ids in routed)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        optimizer.zero_grad()
        (loss + LOAD_PENALTY * penalty).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        seconds = time.monotonic() - start
        progress = step / steps if steps else seconds / (60 * minutes)
        if progress >= min(reported + 0.02, 1.0):
            reported, speed = progress, step * batch * length / seconds
            load = torch.stack([relative_load(topk_ids, p.shape[1]) for p, _, topk_ids in routed])  # [L, E]
            print(
                f"{progress:4.0%}  step {step}  {loss.item() / math.log(2):.3f} bits/byte  {speed:,.0f} tokens/s"
                f"  load over mean: least {load.min():.2f}, busiest {load.amax(1).min():.1f} to {load.max():.1f}",
                flush=True,
            )
    return {"steps": step, "tokens": step * batch * length, "seconds": round(seconds, 1)}


def measure(folder: Path) -> dict[str, Any]:
    """Load a checkpoint as a user would, and measure it in float32 on its held-out text.

    Returns:
        Sizes, bits per byte, and for each layer the load of its least and most used expert.
    """
    model = Gemma4ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer((folder / "held_out.txt").read_bytes().decode(), return_tensors="pt").input_ids[0]
    with tokens_per_expert(model) as load:
        bits = bits_per_byte(model, tokens)
    scales = torch.cat([layer.router.per_expert_scale.detach() for layer in model.model.layers])
    return {
        "checkpoint_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "parameters": model.num_parameters(),
        "held_out_tokens": len(tokens) - 1,
        "bits_per_byte": round(bits, 4),
        "bits_per_byte_how": "float32, non-overlapping windows of 512 predictions, BOS before the text",
        "least_used_expert_tokens": load.amin(1).tolist(),
        "busiest_expert_over_mean": [round(x, 2) for x in (load.amax(1) / load.double().mean(1)).tolist()],
        "per_expert_scale_range": [round(scales.min().item(), 3), round(scales.max().item(), 3)],
    }


def broken_bounds(facts: dict[str, Any]) -> list[str]:
    """List the bounds that ``facts``, the result of `measure`, break."""
    low, high = facts["per_expert_scale_range"]
    kept = {
        "at most 8 MB": facts["checkpoint_bytes"] <= MAX_CHECKPOINT_BYTES,
        "64 KB of held-out text, one token per byte": facts["held_out_tokens"] == HELD_OUT_BYTES,
        f"at most {MAX_BITS_PER_BYTE} bits per byte": facts["bits_per_byte"] <= MAX_BITS_PER_BYTE,
        "every expert of every layer used": min(facts["least_used_expert_tokens"]) > 0,
        f"in every layer an expert with {MIN_BUSIEST_OVER_MEAN:g} times the mean load": (
            min(facts["busiest_expert_over_mean"]) >= MIN_BUSIEST_OVER_MEAN
        ),
        "per-expert scales that differ": low < high,
    }
    return [bound for bound, holds in kept.items() if not holds]


def make(folder: Path, device: str, **options: Any) -> dict[str, Any]:
    """Train a model with the ``options`` of `train`, save it with all it needs, and describe the run."""
    texts, held_out = read_corpus()
    stream = token_stream(texts).to(device)
    ALL_EXPERTS_FUNCTIONS.register("every_expert", every_expert_forward)
    model = build_model().to(device)
    model.set_experts_implementation("every_expert")
    print(f"{len(texts)} files, {len(stream):,} tokens, {model.num_parameters():,} parameters, on {device}")
    run = train(model, stream, **options)

    folder.mkdir(parents=True, exist_ok=True)
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "held_out.txt").write_bytes(held_out)
    machine = torch.get_device_module(device).get_device_name() if device != "cpu" else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    return {"device": f"{device}, {machine}", "corpus_tokens": len(stream), **options, **run, **versions}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = TINY_GEMMA4,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, xpu.")] = "cpu",
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 5.0,
    steps: Annotated[int | None, typer.Option(help="How many steps to train instead.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Train nothing, measure what is in --out.")] = False,
) -> None:
    """Train the tiny Gemma 4, or check it."""
    run: dict[str, Any] = {}
    if not check:
        torch.manual_seed(seed)
        run = {"seed": seed, **make(out, device, batch=batch, length=length, minutes=minutes, steps=steps)}
    facts = measure(out)
    report = json.dumps(run | facts, indent=2)
    print(report)
    if not check:
        (out / "training.json").write_text(report + "\n")
    if broken := broken_bounds(facts):
        sys.exit(f"{out} must not ship, it lacks: " + "; ".join(broken))


if __name__ == "__main__":
    typer.run(main)
