"""The names of triton_kernels (3.5): its routing data made of what `turnout.route` wrote, and its matmul on them.

`route` under ``turnout.contracts["triton_kernels.matmul_ogs"]`` writes every array that ``matmul_ogs`` reads, in its
dtype. So nothing is cast or computed here, and the library's own routing (a top-k, a bitmatrix, two or three launches
more) is not called. The library is imported at the first use: the package of that name, or the copy in vLLM's wheel.

Source of the shapes: ``routing.py`` and ``matmul_ogs.py`` of the copy in vLLM 0.26; of the layer:
``gpt_oss_triton_kernels_moe.py`` beside it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from turnout.contracts import contracts
from turnout.device import SCHEDULE_BLOCK_SIZES
from turnout.impls import check_kind
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing

CONTRACT = contracts["triton_kernels.matmul_ogs"]
"""What matmul_ogs reads."""


class RoutingObjects(NamedTuple):
    """The library's own objects, as ``matmul_ogs`` takes them."""

    routing_data: Any  # triton_kernels.routing.RoutingData
    gather_indx: Any  # triton_kernels.routing.GatherIndx
    scatter_indx: Any  # triton_kernels.routing.ScatterIndx


class PackedWeights(NamedTuple):
    """Weights of E experts as ``matmul_ogs`` reads them; `pack` makes them."""

    gate_up_proj: Any  # [E, H, 2I]: a tensor, or the library's own of 4-bit values
    down_proj: Any  # [E, I, H]
    gate_up_bias: torch.Tensor | None  # [E, 2I] float32
    down_bias: torch.Tensor | None  # [E, H] float32
    gate_up_precision: Any  # triton_kernels.matmul_ogs.PrecisionConfig
    down_precision: Any


@functools.cache
def library(name: str) -> ModuleType:
    """A module of triton_kernels by its name inside the library, ``"routing"`` or ``"matmul_ogs"``.

    Raises:
        ImportError: neither the package is there nor vLLM's copy of it.
    """
    if importlib.util.find_spec("triton_kernels") is None:
        _alias_the_copy_of_vllm()
    return importlib.import_module(f"triton_kernels.{name}")


def _alias_the_copy_of_vllm() -> None:
    """Make vLLM's copy importable under the name by which its modules import each other; vLLM does the same."""
    vllm = importlib.util.find_spec("vllm")
    for folder in (vllm and vllm.submodule_search_locations) or ():
        source = Path(folder) / "third_party" / "triton_kernels" / "__init__.py"
        if source.is_file():
            places = [str(source.parent)]
            spec = importlib.util.spec_from_file_location("triton_kernels", source, submodule_search_locations=places)
            assert spec is not None, "a file that is there has a spec"
            assert spec.loader is not None, "and a loader"
            sys.modules["triton_kernels"] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return
    raise ImportError(
        "no triton_kernels here: install vLLM, whose wheel holds a copy, or the package from "
        "https://github.com/triton-lang/triton/tree/main/python/triton_kernels (3.5)"
    )


def routing_objects(routing: Routing) -> RoutingObjects:
    """The library's objects around the arrays of a routing: no array is made, cast or copied.

    Args:
        routing: what `turnout.route` wrote under `CONTRACT`, or another contract with its structures in int32.

    Raises:
        ValueError: a structure is missing, or not of int32.
    """
    check_kind("routing", routing, Routing)
    for name in CONTRACT.structures:
        structure = getattr(routing, name)
        if structure is None or (structure.dtype != torch.int32 and name != "permuted_weights"):
            given = "is missing" if structure is None else f"is {structure.dtype}"
            raise ValueError(
                f"triton_kernels reads {name} of int32, and the routing's {given}; route with "
                "turnout.contracts['triton_kernels.matmul_ogs']"
            )
    module = library("routing")
    offsets, schedule = routing.block_offsets, routing.block_schedule
    inverse = routing.inv_permuted_idx.view(-1)  # type: ignore[union-attr]
    data = module.ExptData(
        routing.tokens_per_expert,
        routing.expert_offsets,
        dict(zip(SCHEDULE_BLOCK_SIZES, offsets.unbind(), strict=True)),  # type: ignore[union-attr]
        dict(zip(SCHEDULE_BLOCK_SIZES, schedule.unbind(), strict=True)),  # type: ignore[union-attr]
    )
    num_experts, top_k = routing.tokens_per_expert.shape[0], routing.topk_ids.shape[1]  # type: ignore[union-attr]
    return RoutingObjects(
        module.RoutingData(routing.permuted_weights, routing.tokens_per_expert, num_experts, top_k, data),
        module.GatherIndx(src_indx=routing.permuted_idx, dst_indx=inverse),
        module.ScatterIndx(src_indx=inverse, dst_indx=routing.permuted_idx),
    )


def pack(weights: ExpertsWeights, spec: ExpertsSpec, *, mxfp4: bool = False) -> PackedWeights:
    """Weights in the library's form, made once when a model is loaded.

    Biases are widened to float32, as the library reads them. MXFP4 weights are 4-bit floats with a scale for 32
    inputs, quantised and laid out for the current device by the library's own functions.

    Args:
        weights: in gpt-oss's layout: gate_up_proj [E, H, 2I], down_proj [E, I, H], bfloat16.
        spec: says so: transposed and interleaved, with the activation that the library fuses.
        mxfp4: quantise.

    Raises:
        ValueError: the spec is of other experts than the library's fused activation computes.
    """
    _check_spec(spec)
    matmul = library("matmul_ogs")
    packed: list[Any] = []
    for weight in (weights.gate_up_proj, weights.down_proj):
        packed.append(quantized(weight) if mxfp4 else (weight, None))
    biases = [None if bias is None else bias.float() for bias in (weights.gate_up_bias, weights.down_bias)]
    precisions = [matmul.PrecisionConfig(weight_scale=scale, out_dtype=torch.bfloat16) for _, scale in packed]
    return PackedWeights(packed[0][0], packed[1][0], biases[0], biases[1], *precisions)


def quantized(weight: torch.Tensor) -> tuple[Any, Any]:
    """A weight [E, K, N] as MXFP4 values and scales along K, in the layouts that the library prefers on this device."""
    tensor, layout = library("tensor"), library("tensor_details.layout")
    values, scales = library("numerics_details.mxfp").downcast_to_mxfp(weight, torch.uint8, axis=1)
    values_layout, values_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scales_layout, scales_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
    if values_layout is layout.HopperMXValueLayout:  # as vLLM does: scales come in fours, and K is not split
        library("matmul_ogs_details.opt_flags").update_opt_flags_constraints({"split_k": 1})
        scales = torch.nn.functional.pad(scales.mT, (0, -scales.shape[1] % 4)).mT
    wrapped = tensor.wrap_torch_tensor(values, dtype=tensor.FP4), tensor.wrap_torch_tensor(scales)
    return (
        tensor.convert_layout(wrapped[0], values_layout, **values_options),
        tensor.convert_layout(wrapped[1], scales_layout, **scales_options),
    )


def experts(hidden_states: torch.Tensor, weights: PackedWeights, routing: Routing, spec: ExpertsSpec) -> torch.Tensor:
    """Experts through the library's matmul: gather, gate_up and activation; then down, weights and the sum over K.

    Args:
        hidden_states: [T, H] bfloat16.
        weights: from `pack`.
        routing: what `turnout.route` wrote under `CONTRACT`.
        spec: as given to `pack`.

    Returns:
        [T, H] bfloat16.

    Raises:
        ValueError: hidden states of another dtype or shape, or a routing without the structures.
    """
    if hidden_states.dtype != torch.bfloat16 or hidden_states.dim() != 2:
        raise ValueError(
            f"hidden_states must be [T, H] of torch.bfloat16, got {list(hidden_states.shape)} of {hidden_states.dtype}"
        )
    objects = routing_objects(routing)
    if hidden_states.shape[0] == 0:  # the library divides by the size of its grid
        return torch.empty_like(hidden_states)
    matmul = library("matmul_ogs")
    activation = matmul.FusedActivation(
        matmul.FnSpecs("swiglu", library("swiglu").swiglu_fn, ("alpha", "limit")),
        (spec.activation_alpha, spec.activation_limit),
        2,
    )
    activated = matmul.matmul_ogs(
        hidden_states, weights.gate_up_proj, weights.gate_up_bias, objects.routing_data,
        gather_indx=objects.gather_indx, precision_config=weights.gate_up_precision, fused_activation=activation,
    )  # fmt: skip
    output: torch.Tensor = matmul.matmul_ogs(
        activated, weights.down_proj, weights.down_bias, objects.routing_data, scatter_indx=objects.scatter_indx,
        precision_config=weights.down_precision, gammas=objects.routing_data.gate_scal,
    )  # fmt: skip
    return output


def _check_spec(spec: ExpertsSpec) -> None:
    check_kind("spec", spec, ExpertsSpec)
    fused = ExpertsSpec(
        activation="silu", activation_alpha=spec.activation_alpha, activation_limit=spec.activation_limit,
        up_offset=1.0, transposed=True, interleaved=True, bias=spec.bias,
    )  # fmt: skip
    if spec != fused:
        raise ValueError(f"triton_kernels fuses the activation of gpt-oss in its layout, {fused}; the spec is {spec}")
