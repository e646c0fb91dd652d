"""The names of vllm-xpu-kernels: what its routing consumer reads, and turnout's counterpart of that consumer.

`consumer` says which form of ids and weights the installed version reads. `remap_hidden_states`, `moe_gather` and
`XpuFusedMoe` take the arguments of the functions of these names, and run on any device that turnout has kernels for.
None of it has run on an Intel GPU: see docs/XPU.md.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from typing import Any, NamedTuple

import torch

from turnout.combine.api import combine
from turnout.contracts import Contract, contracts
from turnout.remap.api import Remapped, remapped_experts
from turnout.remap.api import remap_hidden_states as remap
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights

_BOTH_DTYPES = (0, 1, 8)  # the first release that reads int32 and int64 ids: 702c024 of 2026-04-28
_SWIGLUOAI = ExpertsSpec(
    activation_alpha=1.702, activation_limit=7.0, up_offset=1.0, transposed=True, interleaved=True
)  # fmt: skip
_ACTIVATIONS = {
    "silu": ExpertsSpec(activation="silu", transposed=True),
    "gelu": ExpertsSpec(activation="gelu", transposed=True),
    "gelu_tanh": ExpertsSpec(activation="gelu_tanh", transposed=True),
    "swigluoai": _SWIGLUOAI,
}


class Consumer(NamedTuple):
    """What reads the ids and weights on an XPU.

    Attributes:
        name: its entry in `turnout.contracts`.
        contract: what `turnout.route` writes for it, without structures: it counts and places slots itself.
        reason: why it is that one.
    """

    name: str
    contract: Contract
    reason: str


def consumer(version: str | None = None) -> Consumer:
    """The consumer of routing in a version of vllm-xpu-kernels.

    Args:
        version: of vllm-xpu-kernels; None: the one installed or, where there is none, turnout's counterpart.

    Raises:
        ValueError: not a version.
    """
    if version is None:
        try:
            version = importlib.metadata.version("vllm_xpu_kernels")
        except importlib.metadata.PackageNotFoundError:
            return _consumer("", "vllm_xpu_kernels is not installed, and turnout's counterpart reads int32 and int64")
    if _release(version) < (*_BOTH_DTYPES, True):
        return _consumer(".before_0.1.8", f"vllm_xpu_kernels {version} is older than 0.1.8: it casts int32 to int64")
    return _consumer("", f"vllm_xpu_kernels {version} is 0.1.8 or later: it reads int32 and int64")


def _consumer(variant: str, reason: str) -> Consumer:
    name = f"xpu.remap_hidden_states{variant}"
    return Consumer(name, dataclasses.replace(contracts[name], structures=()), reason)


def _release(version: str) -> tuple[int, int, int, bool]:
    """Three numbers, and whether it is that release or later: what leads up to it ("0.1.8rc1") sorts before it."""
    match = re.fullmatch(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:\.\d+)*([-._]?(?:a|b|c|rc|alpha|beta|pre|dev).*)?.*", version)
    if match is None:
        raise ValueError(f"version must be one of vllm-xpu-kernels, such as '0.1.16.2', got {version!r}")
    major, minor, micro, leads_up = match.groups()
    return int(major), int(minor), int(micro or 0), leads_up is None


class RemapArguments(NamedTuple):
    """The arguments of ``torch.ops._moe_C.remap_hidden_states``, in its order.

    T tokens of hidden size H, K experts each; E experts of this rank.
    """

    hidden_states: torch.Tensor  # [T, H]
    hidden_states_scales: torch.Tensor | None  # [T, G]
    remapped_hidden_states: torch.Tensor  # [T * K, H], written
    remapped_hidden_states_scales: torch.Tensor | None  # [T * K, G], written
    expert_map: torch.Tensor | None  # [total_experts_num] int32, -1 where not of this rank
    rows_per_expert: torch.Tensor  # [E] int32, written; it need not be zeroed
    unpermuted_row_to_permuted_row: torch.Tensor  # [T, K] int32, written; -1 where the slot was skipped
    topk_ids: torch.Tensor  # [T, K] int32 or int64
    total_experts_num: int
    local_experts_num: int


def remap_hidden_states(*arguments: Any, **named: Any) -> None:
    """``torch.ops._moe_C.remap_hidden_states``: the arguments are those of `RemapArguments`.

    Unlike there, rows of one expert keep the order of their tokens, at every run; any K is taken; ids outside of the
    map or the experts are skipped, with a map and without; every element of the results is written.

    Raises:
        TypeError, ValueError: as ``turnout.remap.api.remap_hidden_states``, whose names differ.
    """
    call = RemapArguments(*arguments, **named)
    if call.expert_map is not None and call.total_experts_num != len(call.expert_map):
        raise ValueError(
            f"total_experts_num is {call.total_experts_num}, but expert_map has {len(call.expert_map)} entries"
        )
    remap(
        call.hidden_states,
        call.topk_ids,
        call.local_experts_num,
        expert_map=call.expert_map,
        hidden_states_scales=call.hidden_states_scales,
        out=Remapped(
            call.remapped_hidden_states,
            call.rows_per_expert,
            call.unpermuted_row_to_permuted_row,
            call.remapped_hidden_states_scales,
        ),
    )


def moe_gather(
    output: torch.Tensor,
    moe_output: torch.Tensor,
    topk_weights: torch.Tensor,
    unpermuted_row_to_permuted_row: torch.Tensor,
    num_experts: int,
) -> None:
    """``torch.ops._moe_C.moe_gather``: sum the rows of each token's slots, times their weights, in float32.

    Args:
        output: [T, H], written; of the dtype of ``moe_output``.
        moe_output: [T * K, H], the experts' outputs, as `remap_hidden_states` ordered them.
        topk_weights: [T, K] float32.
        unpermuted_row_to_permuted_row: [T, K] int32; -1: the slot is skipped.
        num_experts: not needed, nor there.

    Raises:
        TypeError, ValueError: as `turnout.combine`, or the weights are not float32.
    """
    if topk_weights.dtype != torch.float32:
        raise ValueError(f"topk_weights must be torch.float32, as moe_gather reads them, got {topk_weights.dtype}")
    combine(moe_output, topk_weights, unpermuted_row_to_permuted_row, out=output)


@dataclasses.dataclass
class XpuFusedMoe:
    """``vllm_xpu_kernels.fused_moe_interface.XpuFusedMoe`` for weights that are not quantised.

    Attributes:
        w13: [E, H, 2I], gate columns before up columns; with ``"swigluoai"`` they alternate.
        w13_scales: of quantised weights; None.
        w13_bias: [E, 2I] or None.
        w2: [E, I, H].
        w2_scales: of quantised weights; None.
        w2_bias: [E, H] or None.
        n_experts_per_token: K.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"swigluoai"``.
        num_experts: E, those of this rank.
        ep_rank: this rank; its experts are the E from ``ep_rank * E`` on, unless there is a map.
        ep_size: ranks that share the experts.
        expert_map: [experts of all ranks] int32; -1 where not of this rank.
        gemm1_clamp_limit: gate is clamped to at most this, up to both sides; None: not at all.
    """

    w13: torch.Tensor
    w13_scales: torch.Tensor | None
    w13_bias: torch.Tensor | None
    w2: torch.Tensor
    w2_scales: torch.Tensor | None
    w2_bias: torch.Tensor | None
    n_experts_per_token: int
    activation: str
    num_experts: int
    ep_rank: int = 0
    ep_size: int = 1
    expert_map: torch.Tensor | None = None
    gemm1_clamp_limit: float | None = None
    _spec: ExpertsSpec = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.w13_scales is not None or self.w2_scales is not None:
            raise NotImplementedError(
                "turnout's XpuFusedMoe does not run quantised weights (w13_scales, w2_scales); turnout.experts does"
            )
        self._spec = _spec_of(self.activation, self.gemm1_clamp_limit, self.w13_bias is not None)
        if self.expert_map is None and self.ep_size > 1:
            own = torch.arange(self.num_experts, dtype=torch.int32, device=self.w13.device)
            self.expert_map = own.new_full((self.num_experts * self.ep_size,), -1)
            self.expert_map[self.ep_rank * self.num_experts :][: self.num_experts] = own

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None = None,
        a1q_scale: torch.Tensor | None = None,
        impl: str = "auto",
    ) -> None:
        """Run a layer's experts: remap, both GEMMs with the activation between them, gather.

        Args:
            output: [T, H], written.
            hidden_states: [T, H] in the dtype of the weights.
            topk_weights: [T, K] float32.
            topk_ids: [T, K] int32 or int64; ids of all ranks' experts where there is a map.
            expert_map: in place of the one that the object holds.
            a1q_scale: of quantised hidden states; None.
            impl: ``"auto"``, or one of ``"reference"``, ``"triton"``, ``"cpu"``; a named one runs or raises.

        Raises:
            TypeError, ValueError: as the three functions of turnout that run.
            NotImplementedError: the hidden states are quantised.
        """
        if a1q_scale is not None:
            raise NotImplementedError("turnout's XpuFusedMoe does not run quantised hidden states (a1q_scale)")
        if topk_ids.dim() == 2 and topk_ids.shape[1] != self.n_experts_per_token:
            raise ValueError(
                f"topk_ids has K = {topk_ids.shape[1]}, but n_experts_per_token is {self.n_experts_per_token}"
            )
        expert_map = self.expert_map if expert_map is None else expert_map
        remapped = remap(hidden_states, topk_ids, self.num_experts, expert_map=expert_map, impl=impl)
        weights = ExpertsWeights(self.w13, self.w2, self.w13_bias, self.w2_bias)
        outputs = remapped_experts(
            remapped.hidden_states, remapped.tokens_per_expert, weights, self._spec, impl=impl
        )  # fmt: skip
        combine(outputs, topk_weights, remapped.inv_permuted_idx, out=output, impl=impl)


def _spec_of(activation: str, limit: float | None, bias: bool) -> ExpertsSpec:
    if activation not in _ACTIVATIONS:
        raise NotImplementedError(
            f"turnout's XpuFusedMoe does not run activation={activation!r}; it runs {', '.join(_ACTIVATIONS)}"
        )
    spec = dataclasses.replace(_ACTIVATIONS[activation], bias=bias)
    if limit is None or limit <= 0:  # there, too, 0 stands for no clamp
        return spec
    if spec.activation_limit not in (None, limit):
        raise ValueError(f"gemm1_clamp_limit={limit} contradicts activation={activation!r}, which clamps to 7.0")
    return dataclasses.replace(spec, activation_limit=limit)
