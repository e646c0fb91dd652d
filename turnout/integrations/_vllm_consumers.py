"""Who reads the routing of a layer in vLLM: an entry of `turnout.contracts`, and the form that it reads.

A dispatcher that declares the dtype of the ids is the consumer. On one node none does; then it is the experts class,
looked up by its name and those of its base classes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any, NamedTuple

import torch

from turnout.contracts import Contract, contracts

# Classes of vllm/model_executor/layers/fused_moe, whose subclasses read what they do, to the catalogue's entries.
EXPERTS = {
    "TritonExperts": "vllm.triton_experts",
    "FallbackExperts": "vllm.triton_experts",  # two classes in one; all of them read int32
    "MarlinExpertsBase": "vllm.marlin",
    "BatchedTritonExperts": "vllm.batched_experts",
    "NaiveBatchedExperts": "vllm.batched_experts",
    "BatchedDeepGemmExperts": "vllm.batched_experts",
    "FlashInferCuteDSLBatchedExperts": "vllm.batched_experts",
    "DeepGemmExperts": "vllm.deep_gemm",
    "DeepGemmFP4Experts": "vllm.deep_gemm",
    "CutlassExpertsFp8Base": "vllm.cutlass_fp8",
    "CutlassExpertsFp4": "vllm.cutlass_fp4",
    "CutlassExpertsMxfp4": "vllm.cutlass_fp4",
    "CutlassExpertsW4A8Fp8": "vllm.cutlass_fp8",
    "TrtLlmBf16ExpertsModular": "vllm.trtllm",
    "TrtLlmFp8ExpertsModular": "vllm.trtllm",
    "TrtLlmMxfp4ExpertsModular": "vllm.trtllm",
    "TrtLlmNvFp4ExpertsModular": "vllm.trtllm",
    "_TrtLlmLoRAExpertsBase": "vllm.trtllm",
    "FlashInferExperts": "vllm.flashinfer_cutlass",
    "FlashInferCuteDSLExperts": "vllm.flashinfer_cutedsl",
    "FlashInferB12xExperts": "vllm.flashinfer_b12x",
    "B12xExperts": "vllm.flashinfer_b12x",
    "FlashInferMoeEpExperts": "vllm.flashinfer_moe_ep",
    "MoonEPExperts": "vllm.moonep",
    "AiterExperts": "vllm.aiter",
    "XPUExperts": "vllm.xpu_experts",
    "Rdna3WNA16Experts": "vllm.triton_experts",
    "CPUUnquantizedExperts": "vllm.cpu_unquantized",
    "CPUExpertsFp8": "vllm.cpu_fused_experts",
    "CPUExpertsFp8W8A8": "vllm.cpu_fused_experts",
    "CPUExpertsMxfp4": "vllm.cpu_fused_experts",
    "CPUExpertsInt4": "vllm.cpu_fused_experts",
    "CPUExpertsInt8": "vllm.cpu_fused_experts",
    "ArmCPUExpertsInt8": "vllm.cpu_fused_moe_int8",
    "PowerCPUExpertsInt8": "vllm.cpu_fused_moe_int8",
    "ZenCPUExpertsInt8": "vllm.zentorch",
}
DISPATCHERS = {
    "DeepEPHTPrepareAndFinalize": "vllm.deepep_ht",
    "DeepEPLLPrepareAndFinalize": "vllm.deepep_ll",
    "DeepEPV2PrepareAndFinalize": "vllm.deepep_v2",
    "NixlEPPrepareAndFinalize": "vllm.nixl_ep",
    "MoriPrepareAndFinalize": "vllm.mori",
    "MoonEPPrepareAndFinalize": "vllm.moonep",
    "FlashInferNVLinkOneSidedPrepareAndFinalize": "vllm.flashinfer_nvlink_one_sided",
}
_DEFAULT = "int32, as vLLM's routers write by default"


class Consumer(NamedTuple):
    """A layer's reader of ids and weights.

    Attributes:
        kind: its class.
        name: its entry in `turnout.contracts`; None where there is none.
        contract: the form of ids and weights that it reads; structures are not asked for.
        reason: why this one, in a few words.
    """

    kind: str
    name: str | None
    contract: Contract
    reason: str


def consumer_of(kernel: Any, asked: torch.dtype | None) -> Consumer:
    """The consumer behind a layer's router.

    Args:
        kernel: vLLM's ``FusedMoEKernel``, or None where the experts are of an older kind that has none.
        asked: the dtype that vLLM asks of the router, its dispatcher's declaration.
    """
    if asked is not None:
        dispatcher = None if kernel is None else type(kernel.prepare_finalize)
        name = None if dispatcher is None else _entry_of(dispatcher, DISPATCHERS)
        kind = "a dispatcher" if dispatcher is None else dispatcher.__name__
        contract = Contract(ids_dtype=asked, sentinel=_sentinel(asked))
        return Consumer(kind, name, contract, f"{kind} declares {str(asked).removeprefix('torch.')} ids")
    if kernel is None:
        return Consumer("unknown", None, _form(Contract()), f"unknown consumer: {_DEFAULT}")
    experts = type(kernel.fused_experts)
    name = _gpt_oss_entry(experts) or _entry_of(experts, EXPERTS)
    if name is None:
        return Consumer(experts.__name__, None, _form(Contract()), f"unknown consumer {experts.__name__}: {_DEFAULT}")
    return Consumer(experts.__name__, name, _form(contracts[name]), f"no dispatcher declares: {experts.__name__} reads")


def _form(contract: Contract) -> Contract:
    """Ids and weights alone: vLLM's experts find structures themselves. Its weights are float32 until they cast."""
    return dataclasses.replace(
        contract, structures=(), block_size=None, weights_dtype=torch.float32, sentinel=_sentinel(contract.ids_dtype)
    )


def _sentinel(ids_dtype: torch.dtype) -> int:
    """What vLLM's routers write for padding: -1, in the bits of the dtype. They do so whoever reads it."""
    return -1 if ids_dtype.is_signed else torch.iinfo(ids_dtype).max


def _entry_of(kind: type, table: dict[str, str]) -> str | None:
    return next((table[base.__name__] for base in kind.__mro__ if base.__name__ in table), None)


def _gpt_oss_entry(experts: type) -> str | None:
    """Those experts cast the ids to what the installed triton_kernels reads."""
    if not any(base.__name__ == "BaseOAITritonExperts" for base in experts.__mro__):
        return None
    if _version("triton_kernels") < (3, 8):
        return "vllm.gpt_oss_triton.before_triton_kernels_3_8"
    return "vllm.gpt_oss_triton" if _version("vllm") >= (0, 33) else "vllm.gpt_oss_triton.0_32"


def _version(package: str) -> tuple[int, int]:
    """Major and minor; (0, 0) where it is not installed: vLLM's own copy of triton_kernels is older than 3.8."""
    try:
        major, minor = importlib.metadata.version(package).split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)
    return int(major), int(minor)
