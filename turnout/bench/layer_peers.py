"""The layers that turnout is measured against: vLLM's fused MoE, and the chains of transformers.

Nothing of either is copied: each variant calls the peer's own functions as the peer's own model does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from turnout.bench.layer_case import Case, Geometry
from turnout.bench.vllm_kernel import find_source, load_gemma4_routing

Call = Callable[[int], torch.Tensor]

# vLLM prints a lot, reports its use over the network, and loads plugins, unless told otherwise.
_VLLM_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""}
_ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
}


class Vllm:
    """vLLM's layer as its Gemma 4 runs it without quantisation: its routing kernel, then its ``fused_experts``.

    Attributes:
        version: of vLLM.
        folder: of its package.
    """

    def __init__(self, site: Path | None) -> None:
        """Import vLLM.

        Args:
            site: folder to import it from, before all others; None: from where Python finds it.

        Raises:
            ImportError: it is not there, or cannot run here; the message says why.
        """
        for name, value in _VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if site is not None:
            sys.path.insert(0, str(site))
        try:
            # fused_moe is the package, and a module in it.
            self._package: Any = importlib.import_module("vllm.model_executor.layers.fused_moe")
            self._module: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
            has_triton = importlib.import_module("vllm.triton_utils").HAS_TRITON
        except (ImportError, OSError, RuntimeError, AttributeError, ValueError, TypeError, AssertionError) as error:
            raise ImportError(f"vLLM cannot be imported: {type(error).__name__}: {error}") from error
        if not has_triton or not hasattr(torch.ops._moe_C, "moe_align_block_size"):
            raise ImportError("vLLM is here, but without Triton or without its compiled operators it has no fused MoE")
        package: Any = importlib.import_module("vllm")
        self.version = str(package.__version__)
        self.folder = Path(package.__file__).parent
        _, self._route = load_gemma4_routing(find_source(self.folder))

    def variant(self, case: Case, config: dict[str, int] | None) -> Call:
        """The layer, with the tile configuration that vLLM itself chooses, or with a given one."""
        geometry = case.geometry
        activation = self._package.MoEActivation(geometry.activation)

        def call(i: int) -> torch.Tensor:
            hidden_states, router_logits, weights, per_expert_scale = case.at(i)
            with self._configured(config):
                topk_weights, topk_ids = self._route(router_logits, geometry.top_k, per_expert_scale)
                out: torch.Tensor = self._module.fused_experts(
                    hidden_states,
                    weights.gate_up_proj,
                    weights.down_proj,
                    topk_weights,
                    topk_ids,
                    activation=activation,
                    global_num_experts=geometry.num_experts,
                )
            return out

        return call

    def chosen_config(self, case: Case) -> dict[str, Any]:
        """The tile configuration that vLLM chooses by itself."""
        weights = case.at(0).weights
        shapes = weights.gate_up_proj.size(), weights.down_proj.size()
        config = self._module.try_get_optimal_moe_config(*shapes, case.geometry.top_k, None, case.num_tokens)
        return dict(config)

    def has_tuned_file(self, geometry: Geometry) -> bool:
        """Whether vLLM ships a configuration tuned for this geometry on this device."""
        return self._module.get_moe_configs(geometry.num_experts, geometry.intermediate_size, None) is not None

    @contextlib.contextmanager
    def _configured(self, config: dict[str, int] | None) -> Iterator[None]:
        """As ``override_config`` of vLLM, but undone where a call raises, too."""
        kept, self._package._config = self._package._config, config
        try:
            yield
        finally:
            self._package._config = kept


def nearest_tuned_file(folder: Path, geometry: Geometry) -> Path:
    """The file of vLLM's, tuned on a Hopper GPU for so many experts without quantisation, of the nearest size I.

    Args:
        folder: of the package vllm.
        geometry: of the layer.

    Raises:
        FileNotFoundError: none is for so many experts.
    """
    configs = folder / "model_executor/layers/fused_moe/configs"
    name = re.compile(rf"E={geometry.num_experts},N=(\d+),device_name=NVIDIA_(H200|H100_80GB_HBM3)\.json")
    found = {int(match[1]): path for path in sorted(configs.iterdir()) if (match := name.fullmatch(path.name))}
    if not found:
        raise FileNotFoundError(f"{configs} holds no file tuned on an H100 or H200 for E={geometry.num_experts}")
    return found[min(found, key=lambda size: abs(size - geometry.intermediate_size))]


def tuned_config(file: Path, num_tokens: int) -> dict[str, int]:
    """The configuration for the nearest number of tokens in a file, which is how vLLM chooses one."""
    configs = {int(tokens): config for tokens, config in json.loads(file.read_text()).items() if tokens.isdigit()}
    chosen: dict[str, int] = configs[min(configs, key=lambda tokens: abs(tokens - num_tokens))]
    return chosen


def transformers_variant(case: Case, experts_implementation: str) -> Call:
    """Stock Gemma 4's routing, and the experts of transformers under one of its implementations.

    Args:
        case: what to run on.
        experts_implementation: ``"grouped_mm"`` or ``"batched_mm"``.

    Raises:
        ImportError: transformers is not installed, or another version that has none of that name.
    """
    moe: Any = importlib.import_module("transformers.integrations.moe")
    forward = getattr(moe, f"{experts_implementation}_experts_forward", None)
    if forward is None:
        raise ImportError(f"this version of transformers has no experts implementation {experts_implementation}")
    geometry = case.geometry
    modules = [_experts_module(geometry, weights.gate_up_proj, weights.down_proj) for weights, _ in case.layers]

    def call(i: int) -> torch.Tensor:
        hidden_states, router_logits, _, per_expert_scale = case.at(i)
        probabilities = nn.functional.softmax(router_logits, dim=-1, dtype=torch.float32)
        topk_weights, topk_ids = torch.topk(probabilities, k=geometry.top_k, dim=-1)
        topk_weights /= topk_weights.sum(dim=-1, keepdim=True)
        topk_weights = topk_weights * per_expert_scale[topk_ids]
        out: torch.Tensor = forward(modules[i % len(modules)], hidden_states, topk_ids, topk_weights)
        return out

    return call


def _experts_module(geometry: Geometry, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> SimpleNamespace:
    """What the experts' functions of transformers read of a model's module."""
    activation: Any = _ACTIVATIONS[geometry.activation]

    def apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gated: torch.Tensor = activation(gate) * up
        return gated

    return SimpleNamespace(
        gate_up_proj=gate_up_proj,
        down_proj=down_proj,
        num_experts=geometry.num_experts,
        act_fn=activation,
        has_gate=True,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=True,
        _is_expert_parallel=False,
        _apply_gate=apply_gate,
    )
