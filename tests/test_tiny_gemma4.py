"""The tiny Gemma 4 that ships with turnout, the script that makes it, and the measures taken of it."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("transformers", reason="the tiny Gemma 4 is a transformers model")
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma4ForCausalLM

from turnout.testing.bits_per_byte import bits_per_byte
from turnout.testing.expert_load import tokens_per_expert
from turnout.testing.tiny import TINY_GEMMA4, held_out_text, load_tiny_gemma4

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_tiny_gemma4.py"
VLLM_CPU_HEAD_SIZES = {32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tiny_gemma4", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_GEMMA4)


@pytest.fixture(scope="module")
def model():
    return load_tiny_gemma4()


@pytest.fixture(scope="module")
def measured(model, tokenizer):
    """Bits per byte and expert load on the whole held-out text, from one pass of several seconds."""
    tokens = tokenizer(held_out_text(), return_tensors="pt").input_ids[0]
    with tokens_per_expert(model) as load:
        bits = bits_per_byte(model, tokens)
    return SimpleNamespace(bits=bits, load=load, num_tokens=len(tokens) - 1)


# The checkpoint


def test_stock_from_pretrained_finds_every_weight_and_no_other():
    model, info = AutoModelForCausalLM.from_pretrained(TINY_GEMMA4, output_loading_info=True)
    assert type(model) is Gemma4ForCausalLM
    assert model.dtype == torch.bfloat16
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_checkpoint_is_at_most_8_megabytes():
    assert sum(path.stat().st_size for path in TINY_GEMMA4.iterdir()) <= 8_000_000


def test_layers_and_experts_are_those_of_the_real_model_in_small(model):
    config = model.config
    assert config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert config.num_experts >= 16
    assert config.top_k_experts >= 4
    full_attention = model.model.layers[-1].self_attn
    assert getattr(full_attention, "v_proj", None) is None  # attention_k_eq_v


def test_vllm_on_a_cpu_accepts_the_geometry(model):
    assert model.config.hidden_size % 32 == 0
    assert model.config.moe_intermediate_size % 32 == 0
    assert {layer.self_attn.head_dim for layer in model.model.layers} <= VLLM_CPU_HEAD_SIZES


def test_model_has_learned_to_predict_text_it_was_not_trained_on(measured):
    assert measured.num_tokens == 65536
    assert measured.bits <= 2.2


def test_every_expert_is_used_and_the_busiest_has_three_times_the_mean_load(measured):
    assert measured.load.shape == (6, 32)
    assert (measured.load > 0).all()
    assert (measured.load.amax(1) >= 3 * measured.load.double().mean(1)).all()


def test_per_expert_scales_are_trained(model):
    for layer in model.model.layers:
        assert layer.router.per_expert_scale.unique().numel() > 1


# Its tokenizer


@given(text=st.text())
@settings(deadline=None)
def test_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@given(text=st.text())
@settings(deadline=None)
def test_tokenizer_gives_each_byte_a_token_and_puts_bos_in_front(tokenizer, text):
    expected = [tokenizer.bos_token_id, *(4 + byte for byte in text.encode())]
    assert tokenizer(text).input_ids == expected


def test_special_tokens_are_the_first_ids(tokenizer):
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)


def test_chat_template_renders_messages_line_by_line(tokenizer):
    chat = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "import sys"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<bos>import os\nimport sys\n"


# Bits per byte and expert load


class UniformModel(nn.Module):
    """Predicts every one of its ids with the same probability, and keeps what it was asked."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size
        self.seen = []

    def forward(self, input_ids, use_cache):
        self.seen.append(input_ids)
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocab_size))


@pytest.mark.parametrize("num_predicted", [1, 7, 8, 9, 20])
def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary(num_predicted):
    model = UniformModel(vocab_size=32)
    tokens = torch.arange(num_predicted + 1) % 32
    assert bits_per_byte(model, tokens, window=8) == pytest.approx(5.0)
    # every token but the last is an input exactly once, in order, whatever the window leaves over
    assert torch.equal(torch.cat(model.seen, dim=1)[0], tokens[:-1])


def test_bits_are_shared_out_over_the_bytes_that_the_tokens_spell():
    tokens = torch.arange(11)
    assert bits_per_byte(UniformModel(32), tokens, num_bytes=40) == pytest.approx(5.0 * 10 / 40)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5), torch.zeros(1, dtype=torch.int64)]
)
def test_bits_per_byte_refuses_what_is_not_one_text(tokens):
    with pytest.raises(ValueError, match="tokens must be a vector of at least two int64 ids, got"):
        bits_per_byte(UniformModel(32), tokens)


@pytest.mark.parametrize("bad", [{"window": 0}, {"num_bytes": 0}])
def test_bits_per_byte_refuses_an_empty_window_or_text(bad):
    with pytest.raises(ValueError, match="must be at least 1"):
        bits_per_byte(UniformModel(32), torch.arange(5), **bad)


def test_expert_load_counts_every_selection_while_the_context_lasts(model, measured):
    assert (measured.load.sum(1) == model.config.top_k_experts * measured.num_tokens).all()
    with tokens_per_expert(model) as load:
        model(input_ids=torch.arange(4, 20)[None])
    inside = load.clone()
    model(input_ids=torch.arange(4, 20)[None])
    assert (inside.sum(1) == model.config.top_k_experts * 16).all()
    assert torch.equal(load, inside)


def test_expert_load_refuses_a_model_without_routers():
    with pytest.raises(ValueError, match="no module named 'router'"), tokens_per_expert(nn.Linear(2, 2)):
        pass


# The script


def test_held_out_text_comes_from_no_training_file(script):
    training, held_out = script.read_corpus()
    assert len(held_out) == script.HELD_OUT_BYTES
    # the text is made of the starts of files; shorter ones may well be alike
    starts = [text[: script.HELD_OUT_BYTES_PER_FILE] for text in training if len(text) > 256]
    assert starts
    assert not [start for start in starts if start in held_out]


def test_training_experts_compute_what_stock_experts_do(script):
    torch.manual_seed(0)
    experts = script.build_model().model.layers[0].experts.double()  # leaves only the order of summation to differ
    hidden_states = torch.randn(9, 128, dtype=torch.float64)
    topk_weights, topk_ids = torch.rand(9, 32, dtype=torch.float64).topk(4)
    stock = type(experts).forward.__wrapped__(experts, hidden_states, topk_ids, topk_weights)
    ours = script.every_expert_forward(experts, hidden_states, topk_ids, topk_weights)
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


def test_load_penalty_pushes_up_a_starving_expert(script):
    logits = torch.zeros(24, 8, requires_grad=True)
    # expert 0 is crowded with half of the tokens, 1 to 6 have two each, and nobody selects expert 7
    topk_ids = torch.cat([torch.zeros(12, dtype=torch.int64), torch.arange(12) % 6 + 1])[:, None]
    script.load_penalty(logits.softmax(-1), topk_ids).backward()
    assert (logits.grad[:, 7] < 0).all()  # descent raises this logit ...
    assert (logits.grad[:, :7] > 0).all()  # ... against the others


def test_load_penalty_is_zero_where_no_expert_starves_and_one_is_crowded(script):
    probabilities = torch.full((28, 8), 1 / 8)
    topk_ids = torch.stack([torch.zeros(28, dtype=torch.int64), torch.arange(28) % 7 + 1], dim=1)
    assert script.relative_load(topk_ids, 8)[0] == 4 >= script.CROWDED
    assert script.load_penalty(probabilities, topk_ids) == 0


def test_load_penalty_pushes_up_the_busiest_expert_until_it_is_crowded(script):
    logits = torch.zeros(8, 4, requires_grad=True)
    topk_ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])[:, None]
    script.load_penalty(logits.softmax(-1), topk_ids).backward()
    assert (logits.grad[:, 0] < 0).all()
    assert (logits.grad[:, 1:] > 0).all()


def test_learning_rate_warms_up_and_ends_at_zero(script):
    assert script.learning_rate(0.0) == 0
    assert script.learning_rate(script.WARMUP) == script.PEAK_LEARNING_RATE
    assert script.learning_rate(1.0) == pytest.approx(0.0, abs=1e-9)
    assert math.isclose(script.learning_rate((1 + script.WARMUP) / 2), script.PEAK_LEARNING_RATE / 2)


@pytest.mark.parametrize(
    ("fact", "value", "bound"),
    [
        ("checkpoint_bytes", 8_000_001, "8 MB"),
        ("held_out_tokens", 65535, "one token per byte"),
        ("bits_per_byte", 2.21, "2.2 bits per byte"),
        ("least_used_expert_tokens", [5, 0], "every expert"),
        ("busiest_expert_over_mean", [4.0, 2.9], "3 times the mean"),
        ("per_expert_scale_range", [1.0, 1.0], "scales that differ"),
    ],
)
def test_check_names_the_bound_that_a_checkpoint_breaks(script, fact, value, bound):
    good = {
        "checkpoint_bytes": 7_600_000,
        "held_out_tokens": 65536,
        "bits_per_byte": 1.5,
        "least_used_expert_tokens": [5, 9],
        "busiest_expert_over_mean": [4.0, 3.0],
        "per_expert_scale_range": [0.9, 1.1],
    }
    assert script.broken_bounds(good) == []
    (broken,) = script.broken_bounds(good | {fact: value})
    assert bound in broken
