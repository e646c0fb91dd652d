"""``turnout.router.api.project``: what goes in, what is checked, which implementation runs."""

from __future__ import annotations

import torch

from turnout.impls import Choice, check_hidden_states, check_impl, check_kind, check_readable, check_tensor
from turnout.router import ops as _ops  # registers the operator
from turnout.router.reference import project_reference
from turnout.spec import RouterSpec
from turnout.types import RouterWeights

IMPLS = ("reference", "triton")
FEW_TOKENS = 16  # up to which one launch takes less time than torch's (benchmarks/results)


def project(
    hidden_states: torch.Tensor, router: RouterWeights, spec: RouterSpec, *, impl: str = "auto"
) -> torch.Tensor:
    """Norm, scale and projection of a router, each rounded where the spec says that the model rounds.

    Args:
        hidden_states: [T, H] float32, bfloat16 or float16; rows may lie apart.
        router: the parameters that the spec names.
        spec: ``input_norm``, ``input_norm_eps``, ``projection_dtype`` and ``router_bias`` are read.
        impl: ``"auto"``, ``"reference"`` (torch's GEMM) or ``"triton"`` (one launch; for few tokens); a named one runs
            or raises. They sum in other orders, so that their logits differ in the last bits.

    Returns:
        [T, E], of the dtype of ``hidden_states``, or float32 where the spec projects in float32.

    Raises:
        ValueError: a parameter is missing, not named by the spec, or does not fit.
        TypeError: an argument is not of its type.
    """
    check_kind("router", router, RouterWeights)
    check_kind("spec", spec, RouterSpec)
    check_hidden_states(hidden_states)
    _check_router(hidden_states, router, spec)
    if impl == "auto":
        impl = choose_impl(hidden_states).impl
    else:
        check_impl(impl, IMPLS)
    if impl == "reference":
        return project_reference(hidden_states, router, spec)
    check_readable(hidden_states)
    in_float32 = spec.projection_dtype == "float32"
    return _ops.project(hidden_states, router.proj, router.bias, router.scale, spec.input_norm_eps, in_float32)


def choose_impl(hidden_states: torch.Tensor) -> Choice:
    """The implementation that ``impl="auto"`` takes for these tokens, and the reason."""
    if not (hidden_states.is_cuda or hidden_states.is_xpu):  # "cuda" is what torch calls ROCm devices, too
        return Choice("reference", f"tokens on device type {hidden_states.device.type!r}: torch's GEMM")
    if hidden_states.shape[0] > FEW_TOKENS or hidden_states.stride(1) != 1:
        return Choice("reference", "many tokens on a GPU, or columns apart: torch's GEMM")
    return Choice("triton", "few tokens on a GPU: one launch")


def _check_router(hidden_states: torch.Tensor, router: RouterWeights, spec: RouterSpec) -> None:
    num_experts, hidden_size = spec.num_experts + spec.num_shared_columns, hidden_states.shape[1]
    dtypes, beside = (hidden_states.dtype,), ("hidden_states", hidden_states)
    check_tensor("router.proj", router.proj, (num_experts, hidden_size), dtypes, beside)
    for name, wanted, field, size in (
        ("bias", spec.router_bias, f"router_bias={spec.router_bias}", num_experts),
        ("scale", spec.input_norm == "rms_scale", f"input_norm={spec.input_norm!r}", hidden_size),
    ):
        tensor = getattr(router, name)
        if (tensor is not None) != wanted:
            given = "missing" if tensor is None else "given"
            raise ValueError(f"the spec has {field}, but RouterWeights.{name} is {given}")
        if tensor is not None:
            check_tensor(f"router.{name}", tensor, (size,), dtypes, beside)
