"""Checkpoints that the compressed-tensors library made: a model whose experts run on weights that stay packed.

The library itself is not needed: a checkpoint is safetensors and JSON. Its experts are modules of their own,
``experts.{i}.{gate,up,down}_proj`` with ``weight_packed`` or ``weight``, and ``weight_scale``, as llm-compressor writes
them and vLLM reads them (vLLM 0.26, ``model_executor/models/gemma4.py``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turnout.experts.api import experts
from turnout.experts.quantization import SCHEMES, dequantized, empty_weights, pack_int4
from turnout.integrations._compressed_tensors_config import SCHEMES_RUN, Recipe
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def load_quantized(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """Load a Mixture-of-Experts model whose experts the compressed-tensors library quantised.

    Experts become `QuantizedExperts`, which hold the quantised weights and nothing else; every other module is stock.
    A linear layer elsewhere that is quantised in weights alone is dequantised as it is loaded. Seen to work on Gemma 4.

    Args:
        folder: of the checkpoint: config.json with a ``quantization_config``, and safetensors.
        device: where to load it.
        dtype: of all that is not quantised; None: what the config says.

    Returns:
        The transformers model that the config names, in evaluation mode; ``generate`` works.

    Raises:
        FileNotFoundError: the folder has no config or no safetensors.
        ValueError: the checkpoint is not quantised by this library, or tensors are missing, too many or misshapen.
        NotImplementedError: it is quantised by a scheme that turnout does not run; the message lists those it does.
    """
    import transformers

    folder = Path(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    recipe = Recipe(_quantization_config(folder))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: Any = _model_class(folder, config)._from_config(config, dtype=dtype or config.dtype)
    checkpoint = _Checkpoint(folder, torch.device(device))
    replaced = dict(_replace_experts(model, checkpoint, recipe))
    if not replaced:
        raise ValueError(
            f"no experts in {folder} are quantised; load it with from_pretrained, and call turnout.apply(model)"
        )
    _load_the_rest(model, checkpoint, recipe, tuple(f"{path}." for path in replaced))
    checkpoint.refuse_what_is_left()
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()  # type: ignore[no-any-return]


class QuantizedExperts(nn.Module):
    """The experts of one layer, on weights in the form of a scheme of `turnout.experts.quantization`.

    Attributes:
        spec: what they compute.
        gate_up_proj, down_proj, gate_up_scale, down_scale: as in `turnout.ExpertsWeights`.
    """

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_scale: torch.Tensor
    down_scale: torch.Tensor

    def __init__(self, spec: ExpertsSpec, weights: ExpertsWeights) -> None:
        super().__init__()
        self.spec = spec
        for name in ("gate_up_proj", "down_proj", "gate_up_scale", "down_scale"):
            self.register_parameter(name, nn.Parameter(getattr(weights, name), requires_grad=False))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Experts on hidden states [T, H] with ids and weights [T, K], as transformers calls them."""
        weights = ExpertsWeights(
            self.gate_up_proj, self.down_proj, gate_up_scale=self.gate_up_scale, down_scale=self.down_scale
        )
        return experts(hidden_states, weights, Routing(top_k_weights, top_k_index), self.spec)

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"{len(self.down_proj)} experts, {self.spec}"


def _quantization_config(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if not found or found.get("quant_method") != "compressed-tensors":
        method = found.get("quant_method") if found else None
        raise ValueError(
            f"{folder}/config.json has quant_method={method!r}, not a quantization_config of compressed-tensors; "
            f"{SCHEMES_RUN}"
        )
    return found  # type: ignore[no-any-return]


def _model_class(folder: Path, config: Any) -> Any:
    import transformers

    name = (config.architectures or [None])[0]
    if name is None or not hasattr(transformers, name):
        raise ValueError(
            f"{folder}/config.json has architectures={config.architectures}, of which transformers "
            f"{transformers.__version__} knows no class; name one, for instance ['Gemma4ForCausalLM']"
        )
    return getattr(transformers, name)


class _Checkpoint:
    """The tensors of a folder by name, read when they are asked for."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from safetensors import safe_open

        self._folder = folder
        files: list[Any] = [safe_open(path, "pt", device=str(device)) for path in sorted(folder.glob("*.safetensors"))]
        if not files:
            raise FileNotFoundError(f"no *.safetensors in {folder}")
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        self._unread = set(self._file_of)
        self.device = device

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> torch.Tensor:
        if name not in self._file_of:
            near = [other for other in self._file_of if other.rpartition(".")[0] == name.rpartition(".")[0]]
            raise ValueError(f"{self._folder} has no tensor {name}; beside it there are {near or 'none'}")
        self._unread.discard(name)
        return self._file_of[name].get_tensor(name)  # type: ignore[no-any-return]

    def refuse_what_is_left(self) -> None:
        if self._unread:
            names = sorted(self._unread)
            raise ValueError(
                f"{self._folder} has {len(names)} tensors that this model has no place for: "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )


def _replace_experts(
    model: nn.Module, checkpoint: _Checkpoint, recipe: Recipe
) -> Iterator[tuple[str, QuantizedExperts]]:
    """Put the quantised experts of a checkpoint in the place of stock ones."""
    from turnout.integrations._transformers_experts import experts_spec
    from turnout.integrations._transformers_layers import uses_experts_interface

    stock: list[tuple[str, Any]] = [item for item in model.named_modules() if uses_experts_interface(item[1])]
    for path, module in stock:
        names = [f"{path}.{i}.{name}" for i in range(module.num_experts) for name in _PROJECTIONS]
        schemes = {recipe.scheme_of(name) for name in names}
        if len(schemes) > 1:
            raise NotImplementedError(
                f"the experts {path} are quantised in {len(schemes)} ways: {schemes}; turnout runs a layer's in one"
            )
        scheme = schemes.pop()
        if scheme is not None:
            spec = dataclasses.replace(experts_spec(module), **scheme._asdict())
            quantized = QuantizedExperts(spec, _read_experts(path, module.down_proj.shape, spec, checkpoint))
            model.set_submodule(path, quantized)
            yield path, quantized


def _read_experts(path: str, shape: torch.Size, spec: ExpertsSpec, checkpoint: _Checkpoint) -> ExpertsWeights:
    """The weights of all experts of a layer, of which down_proj has this shape; each is copied once, to its place."""
    scale_dtype = checkpoint.read(f"{path}.0.down_proj.weight_scale").dtype
    num_experts, hidden_size, intermediate_size = shape
    weights = empty_weights(
        num_experts, hidden_size, intermediate_size, spec, scale_dtype=scale_dtype, device=checkpoint.device
    )
    assert weights.gate_up_scale is not None, "empty_weights makes them"
    assert weights.down_scale is not None, "empty_weights makes them"
    for expert in range(num_experts):
        rows = (*weights.gate_up_proj[expert].chunk(2), weights.down_proj[expert])
        scales = (*weights.gate_up_scale[expert].chunk(2), weights.down_scale[expert])
        for name, weight, scale in zip(_PROJECTIONS, rows, scales, strict=True):
            _read_module(f"{path}.{expert}.{name}", spec, checkpoint, weight, scale)
    return weights


def _read_module(
    module: str, spec: ExpertsSpec, checkpoint: _Checkpoint, weight: torch.Tensor, scale: torch.Tensor
) -> None:
    """Copy weight and scales of one linear module into their places."""
    found = checkpoint.read(f"{module}.{'weight_packed' if f'{module}.weight_packed' in checkpoint else 'weight'}")
    found_scale = checkpoint.read(f"{module}.weight_scale")
    if SCHEMES[spec.quantization].weight_bits == 4 and found.dtype == torch.int8:  # W4A8 is stored unpacked
        found = pack_int4(found)
    if spec.group_size is None and found_scale.numel() == 1:  # one for the tensor
        found_scale = found_scale.reshape(1, 1).expand_as(scale)
    if f"{module}.weight_shape" in checkpoint:
        checkpoint.read(f"{module}.weight_shape")
    for name, tensor, place in (("weight", found, weight), ("weight_scale", found_scale, scale)):
        if tensor.shape != place.shape or tensor.dtype != place.dtype:
            raise ValueError(
                f"{module}.{name} must be {list(place.shape)} of {place.dtype} for quantization="
                f"{spec.quantization!r}, got {list(tensor.shape)} of {tensor.dtype}"
            )
        place.copy_(tensor)


def _load_the_rest(model: Any, checkpoint: _Checkpoint, recipe: Recipe, done: tuple[str, ...]) -> None:
    """Load all that is not under the prefixes that are done, and make what no checkpoint holds."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(done)}
    loaded = {}
    for name, empty in state.items():
        if name in getattr(model, "all_tied_weights_keys", {}) and name not in checkpoint:
            continue
        tensor = _read_plain(name, checkpoint, recipe)
        if tensor.shape != empty.shape:
            raise ValueError(f"{name} must be {list(empty.shape)}, got {list(tensor.shape)}")
        loaded[name] = tensor.to(empty.dtype)
    model.load_state_dict(loaded, strict=False, assign=True)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = not tensor.is_meta
    for module in model.modules():  # buffers that are computed from the config
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, torch.empty_like(buffer, device=checkpoint.device), persistent=False)
    model.initialize_weights()
    model.tie_weights()


def _read_plain(name: str, checkpoint: _Checkpoint, recipe: Recipe) -> torch.Tensor:
    """A tensor as it is; the weight of a linear module that is quantised in weights alone, dequantised."""
    module, _, parameter = name.rpartition(".")
    if parameter != "weight" or f"{module}.weight_scale" not in checkpoint:
        return checkpoint.read(name)
    scheme = recipe.scheme_of(module)
    if scheme is None or scheme.quantization != "w4a16":
        raise NotImplementedError(
            f"{module} is quantised with its activations ({scheme}), which turnout runs in experts alone; leave it out "
            "when you quantise (ignore=...)"
        )
    spec = ExpertsSpec(quantization="w4a16", group_size=scheme.group_size)
    packed, scale = checkpoint.read(f"{module}.weight_packed"), checkpoint.read(f"{module}.weight_scale")
    checkpoint.read(f"{module}.weight_shape")
    return dequantized(packed, scale, spec).to(scale.dtype)
