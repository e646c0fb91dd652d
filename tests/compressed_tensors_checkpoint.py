"""Checkpoints in the form of compressed-tensors of a Gemma 4: written here, or by the library itself.

What needs the library imports it inside.
"""

import copy
import json

import torch
from safetensors.torch import save_file
from torch import nn

import turnout
from turnout.experts.quantization import dequantized, quantize_weights

_INT8_BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False}
GROUPS = {  # of a quantization_config, by turnout's name of the scheme
    "w4a16": {
        "weights": _INT8 | {"num_bits": 4, "strategy": "group", "group_size": 32},
        "input_activations": None,
        "format": "pack-quantized",
    },
    "w4a8_int8": {
        "weights": _INT8 | {"num_bits": 4, "strategy": "group", "group_size": 32},
        "input_activations": _INT8_BY_TOKEN,
        "format": "pack-quantized",
    },
    "w8a8_int8": {"weights": _INT8, "input_activations": _INT8_BY_TOKEN, "format": "int-quantized"},
    "w8a8_fp8": {
        "weights": _INT8 | {"type": "float"},
        "input_activations": _INT8_BY_TOKEN | {"type": "float"},
        "format": "float-quantized",
    },
}
PRESETS = {"w4a16": "W4A16", "w4a8_int8": "W4A8", "w8a8_int8": "W8A8", "w8a8_fp8": "FP8_DYNAMIC"}
EXPERTS = "re:.*experts\\.\\d+\\..*_proj$"


class Expert(nn.Module):
    """One expert as three linear modules: what the library, llm-compressor and vLLM know."""

    def __init__(self, gate_up_proj, down_proj, act_fn):
        super().__init__()
        gate_proj, up_proj = gate_up_proj.chunk(2)
        self.act_fn = act_fn
        for name, weight in (("gate_proj", gate_proj), ("up_proj", up_proj), ("down_proj", down_proj)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            setattr(self, name, linear)

    def forward(self, hidden_states):
        """On [1, tokens, H]: the library takes rows for tokens in three dimensions alone."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Experts(nn.ModuleList):
    """The experts of a layer, one after the other, as Gemma4TextExperts runs them."""

    def __init__(self, stock):
        weights = zip(stock.gate_up_proj, stock.down_proj, strict=True)
        super().__init__([Expert(gate_up_proj, down_proj, stock.act_fn) for gate_up_proj, down_proj in weights])

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for i, expert in enumerate(self):
            token, k = (top_k_index == i).nonzero(as_tuple=True)
            if len(token) > 0:
                values = expert(hidden_states[None, token])[0] * top_k_weights[token, k, None]
                out.index_add_(0, token, values.to(out.dtype))
        return out


def write_checkpoint(folder, stock, quantization):
    """Quantise the experts of a stock Gemma 4, and save it with the names and the config that the library gives.

    Returns:
        The stock model with the dequantised weights, in float32.
    """
    group = GROUPS[quantization]
    spec = turnout.ExpertsSpec(quantization=quantization, group_size=group["weights"]["group_size"])
    model = copy.deepcopy(stock).float()
    tensors = {name: tensor for name, tensor in stock.state_dict().items() if ".experts." not in name}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in stock.all_tied_weights_keys}
    for path, experts in stock.named_modules():
        if path.endswith(".experts"):
            weights = quantize_weights(turnout.ExpertsWeights(experts.gate_up_proj, experts.down_proj), spec)
            tensors |= tensors_of(path, weights, "weight_packed" if quantization.startswith("w4") else "weight")
            for name in ("gate_up", "down"):
                values = dequantized(getattr(weights, f"{name}_proj"), getattr(weights, f"{name}_scale"), spec)
                getattr(model.get_submodule(path), f"{name}_proj").data.copy_(values)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, folder / SAFETENSORS)
    stock.config.architectures = [type(stock).__name__]
    stock.config.save_pretrained(folder)
    targets = {"targets": ["Linear"], "output_activations": None}
    recipe = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": group["format"],
        "config_groups": {"group_0": targets | group},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*\\.mlp\\..*", "re:.*router.*"],
        "kv_cache_scheme": None,
    }
    change(folder / "config.json", lambda config: config | {"quantization_config": recipe})
    return model


SAFETENSORS = "model.safetensors"


def tensors_of(path, weights, name):
    """The stacked experts of a layer as the tensors of modules of their own."""
    tensors = {}
    for i in range(len(weights.down_proj)):
        projections = (*weights.gate_up_proj[i].chunk(2), weights.down_proj[i])
        scales = (*weights.gate_up_scale[i].chunk(2), weights.down_scale[i])
        for module, weight, scale in zip(("gate_proj", "up_proj", "down_proj"), projections, scales, strict=True):
            prefix = f"{path}.{i}.{module}"
            tensors |= {f"{prefix}.{name}": weight, f"{prefix}.weight_scale": scale}
            if name == "weight_packed":
                tensors[f"{prefix}.weight_shape"] = torch.tensor([weight.shape[0], 8 * weight.shape[1]])
    return tensors


def change(path, of_config):
    """Rewrite a file of JSON."""
    path.write_text(json.dumps(of_config(json.loads(path.read_text()))))


def with_linear_experts(model):
    """A copy of a Gemma 4 whose experts are linear modules."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.experts = Experts(layer.experts)
    return model


def scheme_for(quantization, group_size=None, targets=(EXPERTS,)):
    """The library's own scheme of this name."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(PRESETS[quantization], list(targets))
    if group_size is not None:
        scheme.weights.group_size = group_size
    return scheme


def quantize(model, *schemes, ignore=("lm_head",)):
    """Let the library quantise a model of linear experts in place, with min-max scales, and not compress it yet."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = {f"group_{i}": scheme for i, scheme in enumerate(schemes)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=list(ignore)), show_progress=False)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            weight, arguments = module.weight, scheme.weights
            groups = weight.unflatten(-1, (-1, arguments.group_size or weight.shape[-1]))
            lowest, highest = groups.amin(-1), groups.amax(-1)
            if arguments.strategy == "tensor":
                lowest, highest = lowest.amin().reshape(1), highest.amax().reshape(1)
            scale, _ = calculate_qparams(lowest, highest, arguments)
            module.weight_scale.data.copy_(scale)
    return model


def save_compressed(model, folder):
    """Compress a quantised model and save it as the library's own users do."""
    from compressed_tensors.compressors import ModelCompressor

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors")
    compressor.update_config(folder)


def dequantized_stock(compressed, stock):
    """A stock model with the weights that the library decompresses."""
    from compressed_tensors.compressors import ModelCompressor

    decompressed = copy.deepcopy(compressed)
    ModelCompressor.from_pretrained_model(decompressed).decompress_model(decompressed)
    model = copy.deepcopy(stock)
    for layer, source in zip(model.model.layers, decompressed.model.layers, strict=True):
        gate_up = [torch.cat((expert.gate_proj.weight, expert.up_proj.weight)) for expert in source.experts]
        layer.experts.gate_up_proj.data.copy_(torch.stack(gate_up))
        layer.experts.down_proj.data.copy_(torch.stack([expert.down_proj.weight for expert in source.experts]))
    return model
