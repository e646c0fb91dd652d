"""The router's projection of a layer of vLLM, run by turnout where tokens are few: mode ``layer``.

vLLM's ``GateLinear`` chooses among kernels; what turnout replaces is the last choice for bfloat16 on a GPU, cuBLAS,
which takes two launches for few tokens.
"""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

import torch

from turnout.integrations import _vllm_modes as modes
from turnout.integrations._vllm_report import logger
from turnout.integrations._vllm_runner import FUSED_MOE, call_after_init
from turnout.operators import operator
from turnout.router import ops as router_ops
from turnout.router.api import FEW_TOKENS

MODULE = FUSED_MOE + "router.gate_linear"
# The kernels that vLLM prefers to cuBLAS, by the attributes that say whether this machine and layer may have them.
_PREFERRED = ("allow_ll_bf16_gemm", "allow_dsv3_router_gemm", "allow_fp32_router_gemm", "allow_bf16x3_router_gemm")


def register_gates() -> None:
    """Let the projections that vLLM makes from now on take turnout's launch, where the mode is ``layer``."""
    kind: Any = importlib.import_module(MODULE).GateLinear
    if not hasattr(kind.__init__, "is_turnout"):
        call_after_init(kind, _bind)


def _bind(gate: Any) -> None:
    from vllm.config import get_current_vllm_config

    if modes.configured_mode(get_current_vllm_config().additional_config) == "layer":
        gate.forward = types.MethodType(forward, gate)
        _say()


@functools.cache
def _say() -> None:
    logger().info("turnout projects to router logits for at most %d tokens, where vLLM would take cuBLAS", FEW_TOKENS)


def forward(gate: Any, x: torch.Tensor) -> Any:
    """In place of ``GateLinear.forward``."""
    if takes_cublas(gate, x):
        return project(x, gate.weight), None
    return type(gate).forward(gate, x)


def takes_cublas(gate: Any, x: torch.Tensor) -> bool:
    """Whether vLLM would run cuBLAS from bfloat16 to float32."""
    is_eligible = getattr(gate, "allow_cublas_router_gemm", False) and x.dtype == torch.bfloat16
    return is_eligible and not any(getattr(gate, name, False) for name in _PREFERRED)


def _project_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


# An operator: a compiler would settle the choice by the number of tokens once and for all.
@operator("turnout::vllm_gate(Tensor x, Tensor weight) -> Tensor", _project_fake)
def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Router logits in float32, [T, E]: by turnout's launch for few tokens, by vLLM's choice for more."""
    if x.shape[0] <= FEW_TOKENS and modes.forced in (None, "layer"):
        return router_ops.project(x, weight, None, None, 0.0, True)
    return torch.mm(x, weight.T, out_dtype=torch.float32)
