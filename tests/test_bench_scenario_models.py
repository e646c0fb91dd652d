"""The models of `turnout bench scenarios`: those with names, and weights for those without any."""

import pytest
import torch
from torch import nn

from turnout.bench import scenario_models
from turnout.bench.scenario_models import draw_weights, find_checkpoint, read_vocab_size
from turnout.testing.tiny import TINY_GEMMA4


def test_the_tiny_model_and_any_folder_are_taken_as_they_are(tmp_path):
    assert find_checkpoint("tiny", tmp_path) == (TINY_GEMMA4, True)
    assert find_checkpoint(str(TINY_GEMMA4), tmp_path) == (TINY_GEMMA4, True)
    assert not list(tmp_path.iterdir())


def test_the_26b_is_a_config_that_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    checkpoint = find_checkpoint("gemma4-26b", tmp_path)
    assert not checkpoint.has_weights
    assert read_vocab_size(checkpoint) == 262144
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    assert (config.model_type, config.num_experts, config.num_hidden_layers) == ("gemma4_text", 128, 30)


def test_drawn_checkpoints_are_the_same_each_time(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setitem(scenario_models.DRAWN, "gemma4-4-layers", {**scenario_models.FOUR_LAYERS, "vocab_size": 64})
    folders = [tmp_path / name for name in ("a", "b")]
    models = []
    for folder in folders:
        folder.mkdir()
        checkpoint = find_checkpoint("gemma4-4-layers", folder)
        assert checkpoint.has_weights
        models.append(transformers.AutoModelForCausalLM.from_pretrained(folder))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    router = models[0].model.layers[0].router
    assert router.proj.weight.float().std().item() == pytest.approx(0.05, rel=0.05)
    assert 0.5 <= router.per_expert_scale.min().item() < router.per_expert_scale.max().item() <= 1.5


def dummy_model():
    """Named as vLLM's Gemma 4, with weights like its dummy ones."""
    layer = nn.Module()
    layer.router = nn.Module()
    layer.router.proj = nn.Linear(64, 16, bias=False)
    layer.router.scale = nn.Parameter(torch.zeros(64))
    layer.per_expert_scale = nn.Parameter(torch.zeros(16))
    layer.post_attention_layernorm = nn.RMSNorm(64)
    layer.input_layernorm = nn.RMSNorm(64)
    layer.o_proj = nn.Linear(64, 64)
    layer.qweight = nn.Parameter(torch.ones(8, 8, dtype=torch.int32), requires_grad=False)
    layer.register_buffer("layer_scalar", torch.zeros(1))
    layer.register_buffer("cos_sin_cache", torch.zeros(8, 8))
    return nn.ModuleList([layer])


def test_weights_are_drawn_for_a_model_without_any():
    model = dummy_model()
    draw_weights(model)
    (layer,) = model
    layer.requires_grad_(False)
    assert float(layer.router.proj.weight.detach().std()) == pytest.approx(1, rel=0.1)
    assert float(layer.o_proj.weight.detach().std()) == pytest.approx(1 / 8, rel=0.1)
    assert 0.5 <= layer.per_expert_scale.min().item() < layer.per_expert_scale.max().item() <= 1.5
    assert set(layer.input_layernorm.weight.tolist()) == set(layer.router.scale.tolist()) == {1.0}
    assert set(layer.post_attention_layernorm.weight.tolist()) == {1 / 32}
    assert not layer.o_proj.bias.any()
    assert float(layer.layer_scalar) == 1
    assert not layer.cos_sin_cache.any()
    assert bool((layer.qweight == 1).all())
    again = dummy_model()
    draw_weights(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
