"""Against the compressed-tensors library itself: its checkpoints, its rounding, and what it computes on them."""

import pytest
import torch
from compressed_tensors_checkpoint import (
    GROUPS,
    dequantized_stock,
    quantize,
    save_compressed,
    scheme_for,
    with_linear_experts,
)
from gemma4_models import MOE_FIELDS, TEXT_FIELDS

import turnout
from turnout.experts.quantization import pack_int4, quantize_activations, quantize_weights, unpack_int4
from turnout.testing.bits_per_byte import bits_per_byte
from turnout.testing.tiny import TINY_GEMMA4, held_out_text, load_tiny_gemma4

pytest.importorskip("compressed_tensors", reason="the compressed-tensors library is not installed")
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.lifecycle.forward import quantize as round_to
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from transformers import AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig

EACH_SCHEME = pytest.mark.parametrize("quantization", GROUPS)


@pytest.fixture(scope="module")
def stock():
    return load_tiny_gemma4()


@pytest.fixture(scope="module")
def tokens():
    text = held_out_text()[:1024]
    return AutoTokenizer.from_pretrained(TINY_GEMMA4)(text, return_tensors="pt").input_ids[0]


def group_size_of(quantization):
    return GROUPS[quantization]["weights"]["group_size"]


@EACH_SCHEME
def test_its_checkpoints_load(quantization, stock, tokens, tmp_path):
    """The packed tensors are those of `quantize_weights`, bit for bit, and the model computes what the library does."""
    linear = quantize(with_linear_experts(stock), scheme_for(quantization, group_size_of(quantization)))
    few = tokens[:65]  # the library quantises the weights anew at each call
    its_bits = bits_per_byte(linear, few)
    save_compressed(linear, tmp_path)
    model = turnout.load_quantized(tmp_path)
    spec = turnout.ExpertsSpec(quantization=quantization, group_size=group_size_of(quantization))
    for layer, stock_layer in zip(model.model.layers, stock.model.layers, strict=True):
        plain = turnout.ExpertsWeights(stock_layer.experts.gate_up_proj.data, stock_layer.experts.down_proj.data)
        wanted = quantize_weights(plain, spec)
        for name, tensor in layer.experts.state_dict().items():
            assert torch.equal(tensor.view(torch.uint8), getattr(wanted, name).view(torch.uint8)), name
    # A quantised activation on a tie may round the other way; a row's largest magnitude, if negative, is on one.
    assert abs(bits_per_byte(model, few) - its_bits) < (1e-4 if quantization == "w4a16" else 0.02)
    if quantization == "w4a16":
        dequantized = dequantized_stock(linear, stock)
        assert abs(bits_per_byte(model, tokens) - bits_per_byte(dequantized, tokens)) < 1e-4


@pytest.mark.parametrize("quantization", ["w4a16", "w4a8_int8"])
def test_groups_of_128(quantization, tmp_path):
    """Its default, for which the tiny model is too small; every linear layer is a target, those to skip are ignored."""
    fields = {**TEXT_FIELDS, **MOE_FIELDS, "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 4}
    stock = Gemma4ForCausalLM._from_config(Gemma4TextConfig(**fields), dtype=torch.float32).eval()
    ignore = ["lm_head", "re:.*router.*", "re:.*self_attn.*", "re:.*\\.mlp\\..*"]
    linear = quantize(with_linear_experts(stock), scheme_for(quantization, targets=["Linear"]), ignore=ignore)
    assert scheme_for(quantization).weights.group_size == 128
    prompt = torch.arange(12)[None]
    with torch.no_grad():
        wanted = linear(prompt).logits
    save_compressed(linear, tmp_path)
    model = turnout.load_quantized(tmp_path)
    assert model.model.layers[0].experts.spec.group_size == 128
    with torch.no_grad():
        difference = (model(prompt).logits - wanted).abs().max()
    assert difference < (1e-4 if quantization == "w4a16" else 1e-2) * wanted.abs().max()


def test_one_scale_for_a_tensor(stock, tmp_path):
    scheme = scheme_for("w8a8_fp8")
    scheme.weights.strategy = "tensor"
    linear = quantize(with_linear_experts(stock), scheme)
    scale = linear.model.layers[3].experts[7].down_proj.weight_scale.detach().clone()
    save_compressed(linear, tmp_path)
    experts = turnout.load_quantized(tmp_path).model.layers[3].experts
    assert scale.shape == (1,)
    assert (experts.down_scale[7] == scale).all()


@pytest.mark.parametrize("preset", ["W4A16_ASYM", "W3A16", "W8A16", "FP8", "FP8_BLOCK", "NVFP4A16", "MXFP4", "W4AFP8"])
def test_its_other_schemes_are_refused(preset, stock, tmp_path):
    from compressed_tensors.quantization import preset_name_to_scheme

    from turnout.integrations._compressed_tensors_config import Recipe

    group = preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json")
    with pytest.raises(NotImplementedError, match="turnout runs, with symmetric weights: w4a16"):
        Recipe({"config_groups": {"group_0": group}}).scheme_of("model.layers.0.experts.0.up_proj")


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_are_rounded_as_the_library_rounds(dtype, kind):
    rows = torch.randn(200, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[3], rows[4], rows[5] = 0, rows[4] * 1e-7, rows[5].abs()
    arguments = QuantizationArgs(num_bits=8, type=kind, strategy="token", dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(rows[None], arguments, torch.nn.Identity())
    stored = torch.int8 if kind == "int" else torch.float8_e4m3fn
    numbers, own_scale = quantize_activations(rows, stored)
    assert torch.equal(own_scale, scale[0])
    assert torch.equal(numbers.float(), round_to(rows, scale[0], zero_point[0], arguments, dtype=stored).float())
    assert torch.equal(numbers.to(dtype) * own_scale, fake_quantize(rows, scale[0], zero_point[0], arguments))


def test_int4_is_packed_as_the_library_packs():
    values = torch.randint(-8, 8, (24, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(pack_int4(values), pack_to_int32(values, 4))
    assert torch.equal(unpack_int4(pack_int4(values)), unpack_from_int32(pack_int4(values), 4, values.shape))
