"""Checkpoints of compressed-tensors: what is loaded, what it computes, and what is refused. See also its library's."""

import json
import re

import pytest
import torch
from allocations import peak_allocation
from compressed_tensors_checkpoint import GROUPS, SAFETENSORS, change, write_checkpoint
from gemma4_models import MOE_FIELDS, TEXT_FIELDS
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
)

import turnout
from turnout.experts.quantization import _quantize_weight, dequantized
from turnout.integrations.compressed_tensors import QuantizedExperts
from turnout.testing.bits_per_byte import bits_per_byte
from turnout.testing.tiny import TINY_GEMMA4, held_out_text, load_tiny_gemma4

EACH_SCHEME = pytest.mark.parametrize("quantization", GROUPS)
# By how much the experts' quantisation may worsen the tiny model. Bits per byte of the whole held-out text, measured in
# float32: 1.2745 plain, 1.2815 and 1.2813 with int4, 1.2742 with int8, 1.2745 with float8.
MOST = {"w4a16": 1.02, "w4a8_int8": 1.02, "w8a8_int8": 1.005, "w8a8_fp8": 1.005}


@pytest.fixture(scope="module")
def stock():
    return load_tiny_gemma4()


@pytest.fixture(scope="module")
def tokens():
    text = held_out_text()[:1024]
    return AutoTokenizer.from_pretrained(TINY_GEMMA4)(text, return_tensors="pt").input_ids[0]


@pytest.fixture(scope="module")
def checkpoints(stock, tmp_path_factory):
    """Folder and dequantised model of each scheme."""
    folders = {name: tmp_path_factory.mktemp(name) for name in GROUPS}
    return {name: (folder, write_checkpoint(folder, stock, name)) for name, folder in folders.items()}


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of the W4A16 checkpoint, to be spoilt."""
    for path in checkpoints["w4a16"][0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@EACH_SCHEME
def test_experts_hold_the_stored_tensors_and_nothing_else(quantization, checkpoints):
    """All else, buffers that no checkpoint holds included, is as in a stock model loaded in that dtype."""
    folder, _ = checkpoints[quantization]
    stored = load_file(folder / SAFETENSORS)
    model = turnout.load_quantized(folder, dtype=torch.bfloat16)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not model.training
    for i, layer in enumerate(model.model.layers):
        experts = layer.experts
        assert isinstance(experts, QuantizedExperts)
        assert set(experts.state_dict()) == {"gate_up_proj", "down_proj", "gate_up_scale", "down_scale"}
        for j in (0, 31):
            prefix = f"model.layers.{i}.experts.{j}"
            weight = "weight_packed" if f"{prefix}.up_proj.weight_packed" in stored else "weight"
            gate_up = torch.cat([stored[f"{prefix}.{name}_proj.{weight}"] for name in ("gate", "up")])
            assert torch.equal(experts.gate_up_proj[j].view(torch.uint8), gate_up.view(torch.uint8))
            assert torch.equal(experts.down_scale[j], stored[f"{prefix}.down_proj.weight_scale"])
    stock, ours = load_tiny_gemma4(torch.bfloat16), model.state_dict() | dict(model.named_buffers())
    for name, tensor in (*stock.state_dict().items(), *stock.named_buffers()):
        if ".experts." not in name:
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_w4a16_computes_what_stock_computes_on_the_dequantised_weights(checkpoints, tokens):
    folder, dequantized = checkpoints["w4a16"]
    model = turnout.load_quantized(folder, dtype=torch.float32)
    assert abs(bits_per_byte(model, tokens) - bits_per_byte(dequantized, tokens)) < 1e-4
    prompt = tokens[None, :40]
    ours = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, dequantized.generate(prompt, max_new_tokens=12, do_sample=False))


@EACH_SCHEME
def test_quantisation_worsens_the_model_little(quantization, checkpoints, stock, tokens):
    model = turnout.load_quantized(checkpoints[quantization][0], dtype=torch.float32)
    bits = bits_per_byte(model, tokens)
    assert bits < MOST[quantization] * bits_per_byte(stock, tokens)
    applied = turnout.apply(model)
    assert {row.router.state for row in applied} == {"replaced"}
    assert abs(bits_per_byte(model, tokens) - bits) < 2e-3


@EACH_SCHEME
def test_bfloat16_generates(quantization, checkpoints):
    model = turnout.load_quantized(checkpoints[quantization][0], dtype=torch.bfloat16)
    assert model.dtype == model.config.dtype == torch.bfloat16
    out = model.generate(torch.tensor([[2, 40, 50, 60]]), max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 9)


def test_experts_compile_as_one_graph(checkpoints):
    model = turnout.load_quantized(checkpoints["w8a8_int8"][0])
    arguments = torch.randn(3, 128), torch.tensor([[1, 2], [3, 4], [5, 31]]), torch.rand(3, 2)
    experts = model.model.layers[0].experts
    assert torch.equal(torch.compile(experts, fullgraph=True, backend="aot_eager")(*arguments), experts(*arguments))


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """Two random layers whose experts are nearly all of the model, in W4A16; and the bytes of these experts."""
    folder = tmp_path_factory.mktemp("large")
    fields = {**TEXT_FIELDS, **MOE_FIELDS, "hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16}
    config = Gemma4TextConfig(**fields)
    write_checkpoint(folder, Gemma4ForCausalLM._from_config(config, dtype=torch.bfloat16), "w4a16")
    model = turnout.load_quantized(folder)
    packed = sum(tensor.nbytes for layer in model.model.layers for tensor in layer.experts.parameters())
    assert packed < 0.3 * 2 * 2 * 16 * 3 * 512 * 512, "of bfloat16"
    return model, packed


def decode_step(model, device):
    """A call that decodes one token after a prompt."""
    prompt = torch.arange(8, device=device)[None]
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    return lambda: model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_a_decode_step_takes_at_most_a_tenth_of_the_packed_weights_beside_them(large_model):
    model, packed = large_model
    step = decode_step(model, "cpu")
    step()
    assert 0 < peak_allocation(step) < 0.1 * packed


@pytest.mark.gpu
@torch.no_grad()
def test_a_decode_step_on_a_gpu_takes_at_most_a_tenth_of_the_packed_weights_beside_them(large_model, gpu):
    model, packed = large_model
    model.to(gpu)
    step = decode_step(model, gpu)
    step()
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    step()
    assert torch.accelerator.max_memory_allocated() - before < 0.1 * packed


def test_the_text_part_of_a_multimodal_model(tmp_path):
    text = Gemma4TextConfig(**{**TEXT_FIELDS, **MOE_FIELDS, "moe_intermediate_size": 32})
    config = Gemma4Config(text_config=text, vision_config=None, audio_config=None)
    stock = Gemma4ForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    dequantized = write_checkpoint(tmp_path, stock, "w4a16")
    model = turnout.load_quantized(tmp_path)
    assert type(model) is Gemma4ForConditionalGeneration
    prompt = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.allclose(model(prompt).logits, dequantized(prompt).logits, atol=1e-4)


def test_shards(folder, checkpoints):
    tensors = load_file(folder / SAFETENSORS)
    names = sorted(tensors)
    (folder / SAFETENSORS).unlink()
    for i, part in enumerate((names[:700], names[700:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{i + 1:05}-of-00002.safetensors")
    whole = turnout.load_quantized(checkpoints["w4a16"][0]).state_dict()
    sharded = turnout.load_quantized(folder).state_dict()
    assert all(torch.equal(sharded[name], tensor) for name, tensor in whole.items())


def test_one_scale_for_a_tensor(folder, stock):
    """FP8 by tensor: its scale stands for every row."""
    write_checkpoint(folder, stock, "w8a8_fp8")
    tensors = load_file(folder / SAFETENSORS)
    tensors = {name: tensor[:1, 0] if "experts" in name and name.endswith("scale") else tensor
               for name, tensor in tensors.items()}  # fmt: skip
    save_file(tensors, folder / SAFETENSORS)
    change(folder / "config.json", lambda config: with_group(config, weights={"strategy": "tensor"}))
    experts = turnout.load_quantized(folder).model.layers[2].experts
    for name, rows in (("gate_proj", slice(0, 32)), ("up_proj", slice(32, 64))):
        scale = tensors[f"model.layers.2.experts.9.{name}.weight_scale"]
        assert torch.equal(experts.gate_up_scale[9, rows], scale.expand(32, 1))


def with_group(config, **changes):
    """A config whose quantisation group is changed: fields of its weights, activations, or of itself."""
    group = config["quantization_config"]["config_groups"]["group_0"]
    for name, value in changes.items():
        group[name] = (group[name] or {}) | value if isinstance(value, dict) else value
    return config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": {"symmetric": False}}, ["int4 asymmetric", "strategy=group"]),
        ({"weights": {"num_bits": 3}}, ["int3 symmetric"]),
        ({"weights": {"actorder": "group"}}, ["actorder=group"]),
        ({"weights": {"strategy": "channel", "group_size": None}}, ["strategy=channel"]),
        ({"weights": {"type": "float", "strategy": "tensor_group", "group_size": 16}}, ["float4", "tensor_group"]),
        ({"weights": {"num_bits": 8, "strategy": "block"}}, ["int8", "strategy=block"]),
        ({"input_activations": GROUPS["w8a8_fp8"]["input_activations"]}, ["input_activations (float8"]),
        ({"input_activations": GROUPS["w8a8_int8"]["input_activations"] | {"dynamic": False}}, ["int8 symmetric"]),
        ({"output_activations": GROUPS["w8a8_int8"]["input_activations"]}, ["output_activations (int8"]),
    ],
)
def test_a_scheme_that_is_not_run(changes, words, folder):
    """The message says what was found, which schemes there are, and what they are called in the library."""
    change(folder / "config.json", lambda config: with_group(config, **changes))
    with pytest.raises(NotImplementedError) as refusal:
        turnout.load_quantized(folder)
    message = str(refusal.value)
    assert "model.layers.0.experts.0.gate_proj" in message
    assert all(word in message for word in (*words, *GROUPS, "W4A16", "W4A8", "W8A8", "FP8_DYNAMIC")), message


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, NotImplementedError, "kv_cache_scheme.*turnout runs.*w4a16"),
        ({"transform_config": {"config_groups": {}}}, NotImplementedError, "transform_config.*turnout runs"),
        ({"quantization_status": "frozen"}, NotImplementedError, "'frozen'.*not compressed"),
        ({"quant_method": "gptq"}, ValueError, "quant_method='gptq'.*turnout runs.*w8a8_fp8"),
        ({"ignore": ["re:.*"]}, ValueError, "no experts in .* are quantised; load it with from_pretrained"),
        ({"ignore": ["re:.*experts.3.up_proj", "re:.*mlp.*"]}, NotImplementedError, "quantised in 2 ways"),
    ],
)
def test_a_recipe_that_is_not_run(fields, kind, words, folder):
    change(
        folder / "config.json",
        lambda config: config | {"quantization_config": config["quantization_config"] | fields},
    )
    with pytest.raises(kind, match=re.compile(words, re.DOTALL)):
        turnout.load_quantized(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("model.layers.1.experts.2.up_proj.weight_packed"), "no tensor .*layers.1.experts.2.up_proj"),
        (lambda t: t.pop("model.norm.weight"), "no tensor model.norm.weight"),
        (lambda t: t.update({"model.layers.0.experts.0.up_proj.weight_zero_point": torch.zeros(1)}), "no place for"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight must be \[128\], got \[3\]"),
        (
            lambda t: t.update({"model.layers.0.experts.0.up_proj.weight_packed": torch.zeros(32, 8).int()}),
            r"up_proj.weight must be \[32, 16\] of torch.int32 .*'w4a16', got \[32, 8\]",
        ),
        (
            lambda t: t.update({"model.layers.0.experts.0.up_proj.weight_scale": torch.zeros(32, 1)}),
            r"up_proj.weight_scale must be \[32, 4\] of torch.float32",
        ),
    ],
)
def test_tensors_that_do_not_fit(spoil, words, folder):
    tensors = load_file(folder / SAFETENSORS)
    spoil(tensors)
    save_file(tensors, folder / SAFETENSORS)
    with pytest.raises(ValueError, match=re.compile(words, re.DOTALL)):
        turnout.load_quantized(folder)


def test_a_folder_that_is_no_checkpoint(folder):
    change(folder / "config.json", lambda config: config | {"architectures": ["Gemma5"]})
    with pytest.raises(ValueError, match=r"architectures=\['Gemma5'\], of which transformers .* knows no class"):
        turnout.load_quantized(folder)
    change(folder / "config.json", lambda config: config | {"architectures": ["Gemma4ForCausalLM"]})
    (folder / SAFETENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape("no *.safetensors in")):
        turnout.load_quantized(folder)
    change(folder / "config.json", lambda config: {k: v for k, v in config.items() if k != "quantization_config"})
    with pytest.raises(ValueError, match="quant_method=None, not a quantization_config of compressed-tensors"):
        turnout.load_quantized(folder)


def test_linear_layers_beside_the_experts(folder, stock):
    """Quantised in weights alone they are dequantised; with their activations they are refused."""
    spec = turnout.ExpertsSpec(quantization="w4a16", group_size=32)
    name = "model.layers.0.self_attn.q_proj"
    packed, scale = _quantize_weight(stock.get_parameter(f"{name}.weight").detach(), spec)
    tensors = load_file(folder / SAFETENSORS)
    del tensors[f"{name}.weight"]
    tensors |= {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale, f"{name}.weight_shape": torch.ones(2)}
    save_file(tensors, folder / SAFETENSORS)
    recipe = json.loads((folder / "config.json").read_text())["quantization_config"]
    ignore = [pattern for pattern in recipe["ignore"] if "attn" not in pattern]
    change(folder / "config.json", lambda config: config | {"quantization_config": recipe | {"ignore": ignore}})
    model = turnout.load_quantized(folder, dtype=torch.float32)
    assert torch.equal(model.get_parameter(f"{name}.weight"), dequantized(packed, scale, spec))

    recipe["config_groups"]["group_1"] = GROUPS["w8a8_int8"] | {"targets": [name]}
    change(folder / "config.json", lambda config: config | {"quantization_config": recipe | {"ignore": ignore}})
    with pytest.raises(NotImplementedError, match=r"q_proj is quantised with its activations.*in experts alone"):
        turnout.load_quantized(folder)


def test_the_bias_of_a_quantised_linear_layer_is_no_weight(tmp_path):
    fields = {**TEXT_FIELDS, **MOE_FIELDS, "moe_intermediate_size": 32, "attention_bias": True}
    stock = Gemma4ForCausalLM._from_config(Gemma4TextConfig(**fields), dtype=torch.float32).eval()
    write_checkpoint(tmp_path, stock, "w4a16")
    name = "model.layers.0.self_attn.q_proj"
    spec = turnout.ExpertsSpec(quantization="w4a16", group_size=32)
    packed, scale = _quantize_weight(stock.get_parameter(f"{name}.weight").detach(), spec)
    tensors, bias = load_file(tmp_path / SAFETENSORS), torch.randn(packed.shape[0])
    del tensors[f"{name}.weight"]
    tensors |= {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale, f"{name}.weight_shape": torch.ones(2)}
    save_file(tensors | {f"{name}.bias": bias}, tmp_path / SAFETENSORS)
    recipe = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    recipe["ignore"] = [pattern for pattern in recipe["ignore"] if "attn" not in pattern]
    change(tmp_path / "config.json", lambda config: config | {"quantization_config": recipe})
    model = turnout.load_quantized(tmp_path)
    assert torch.equal(model.get_parameter(f"{name}.bias"), bias)
    assert torch.equal(model.get_parameter(f"{name}.weight"), dequantized(packed, scale, spec))
