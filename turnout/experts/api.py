"""``turnout.experts``: what goes in, what is checked, which implementation runs."""

from __future__ import annotations

import dataclasses
import functools

import torch

from turnout.contracts import IDS_DTYPES, STRUCTURES, STRUCTURES_DTYPES, WEIGHTS_DTYPES, Contract, contracts
from turnout.experts import ops as _ops  # registers the operators
from turnout.experts import quantization, tuning
from turnout.impls import Choice, check_hidden_states, check_impl, check_kind, check_readable, check_tensor
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing

IMPLS = ("reference", "cpu", "triton", "grouped")
_CONTRACTS = {impl: contracts[f"turnout.experts.{impl}"] for impl in IMPLS}  # a compiler cannot trace the look-up
_MOST_SLOTS = 2**31 - 1
_STRUCTURES_DTYPES = {"bitmatrix": (torch.uint32,), "permuted_weights": WEIGHTS_DTYPES}


def experts(
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    routing: Routing,
    spec: ExpertsSpec,
    *,
    impl: str = "auto",
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run each token through the K experts that it chose, and sum their outputs by weight.

    Products and sums are in float32, those over the K experts in the order k = 0 .. K-1. Rounded to the dtype of
    ``hidden_states`` are the activation, each expert's output (``"triton"`` keeps that of plain weights in float32),
    and the first projection where a CPU's torch multiplies 16-bit matrices. A slot whose id is no expert, or whose
    weight is exactly 0, contributes nothing; nor does an expert that nobody chose. Runs agree to the bit.

    Args:
        hidden_states: [T, H] float32, bfloat16 or float16; rows may lie apart, T may be 0.
        weights: in the layout that ``spec`` states; plain ones in the dtype of ``hidden_states``, quantised ones in the
            form of `turnout.experts.quantization.SCHEMES`. They are read as they are: none is dequantised as a whole.
        routing: topk_weights [T, K] float32, bfloat16 or float16, and topk_ids [T, K] int16, int32, uint32 or int64,
            both contiguous; structures are used where the implementation reads them, and computed where missing.
        spec: what the experts compute.
        impl: ``"auto"``, or one of ``"reference"``, ``"cpu"``, ``"triton"`` (few tokens), ``"grouped"``
            (many tokens); a named one runs or raises.
        batch_invariant: a row's bits do not depend on the rows beside it, nor on T. Those of ``"triton"`` never do;
            ``"grouped"`` then takes one tile, ``"cpu"`` and ``"reference"`` each slot on its own, and ``"auto"`` one
            implementation for every T.
        out: [T, H] of the dtype of ``hidden_states``, contiguous, to write into; not ``hidden_states`` itself.

    Returns:
        [T, H] of the dtype of ``hidden_states``.

    Raises:
        ValueError: an argument does not fit the others; the message says what was given and what is wanted.
        TypeError: an argument is not of its type.
        NotImplementedError: the spec asks for a layout that quantised weights do not have.
    """
    check_kind("weights", weights, ExpertsWeights)
    check_kind("routing", routing, Routing)
    check_kind("spec", spec, ExpertsSpec)
    check_hidden_states(hidden_states)
    check_readable(hidden_states)
    check_fit = check_weights if spec.quantization == "none" else quantization.check_weights
    check_fit(hidden_states, weights, spec)
    check_routing(hidden_states, routing, weights.gate_up_proj.shape[0])
    if impl == "auto":
        sizes = routing.topk_ids.shape[1], weights.gate_up_proj.shape[0]
        impl = choose_impl(hidden_states, *sizes, batch_invariant).impl
    else:
        check_impl(impl, IMPLS)
    structures = routing[2:] if any(structure is not None for structure in routing[2:]) else ()
    arguments = (hidden_states, *weights, *routing[:2], structures, spec.key, impl, batch_invariant)
    if out is None:
        return _ops.experts(*arguments)
    check_tensor("out", out, hidden_states.shape, (hidden_states.dtype,), ("hidden_states", hidden_states))
    _ops.experts_out(*arguments, out=out)
    return out


def choose_impl(hidden_states: torch.Tensor, top_k: int, num_experts: int, batch_invariant: bool = False) -> Choice:
    """The implementation that ``impl="auto"`` takes for these tokens, and the reason."""
    if hidden_states.is_cpu:
        return Choice("cpu", "tokens on a CPU: GEMMs through torch")
    if not (hidden_states.is_cuda or hidden_states.is_xpu):  # "cuda" is what torch calls ROCm devices, too
        device = hidden_states.device.type
        return Choice("reference", f"no kernel for device type {device!r}: plain torch operations")
    if batch_invariant:
        return Choice(tuning.BATCH_INVARIANT_IMPL, "batch_invariant: one implementation for any number of tokens")
    if tuning.are_few(hidden_states.shape[0], top_k, num_experts):
        return Choice("triton", "few tokens on a GPU: two launches, weights read slot by slot")
    return Choice("grouped", "many tokens on a GPU: grouped GEMMs over the slots of each expert")


def contract_of(impl: str, num_slots: int, num_experts: int, num_local_experts: int | None = None) -> Contract:
    """What an implementation reads of so many slots: the contract that lets the routing launch write it.

    Args:
        impl: one of `IMPLS`.
        num_slots: T * K.
        num_experts: E, of the router.
        num_local_experts: experts of this rank, if the weights hold no others; ids then count these.
    """
    counted = num_experts if num_local_experts is None else num_local_experts
    block_size = tuning.block_size(num_slots, counted) if impl == "grouped" else None
    # A compiler sees through a cache, and warns of it.
    return (_make_contract if torch.compiler.is_compiling() else _contract)(impl, block_size, num_local_experts)


def _make_contract(impl: str, block_size: int | None, num_local_experts: int | None) -> Contract:
    contract = _CONTRACTS[impl]
    if num_local_experts is not None:
        contract = dataclasses.replace(contract, id_space="local", num_local_experts=num_local_experts)
    return contract if block_size is None else dataclasses.replace(contract, block_size=block_size)


_contract = functools.cache(_make_contract)


def check_weights(hidden_states: torch.Tensor, weights: ExpertsWeights, spec: ExpertsSpec) -> None:
    """Refuse plain weights that do not fit each other, the spec or the hidden states."""
    dtypes, beside, hidden_size = (hidden_states.dtype,), ("hidden_states", hidden_states), hidden_states.shape[1]
    down_proj = weights.down_proj
    check_kind("down_proj", down_proj, torch.Tensor)
    if down_proj.dim() != 3:
        raise ValueError(f"down_proj must have three dimensions, the experts first; got shape {list(down_proj.shape)}")
    num_experts, intermediate_size = down_proj.shape[0], down_proj.shape[1 if spec.transposed else 2]
    if num_experts < 1 or intermediate_size < 1:
        raise ValueError(f"down_proj must hold an expert, and columns to sum over; got shape {list(down_proj.shape)}")
    gate_up, down = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
    if spec.transposed:
        gate_up, down = gate_up[::-1], down[::-1]
    check_tensor("gate_up_proj", weights.gate_up_proj, (num_experts, *gate_up), dtypes, beside)
    check_tensor("down_proj", down_proj, (num_experts, *down), dtypes, beside)
    if spec.bias or weights.gate_up_bias is not None or weights.down_bias is not None:
        for name, columns in (("gate_up_bias", 2 * intermediate_size), ("down_bias", hidden_size)):
            bias = getattr(weights, name)
            if (bias is not None) != spec.bias:
                given = "missing" if bias is None else "given"
                raise ValueError(f"the spec has bias={spec.bias}, but ExpertsWeights.{name} is {given}")
            if bias is not None:
                check_tensor(name, bias, (num_experts, columns), dtypes, beside)
    if weights.gate_up_scale is not None or weights.down_scale is not None:
        name = "down_scale" if weights.gate_up_scale is None else "gate_up_scale"
        raise ValueError(f"the spec has quantization='none', but ExpertsWeights.{name} is given")


def check_routing(hidden_states: torch.Tensor, routing: Routing, num_experts: int) -> None:
    """Refuse ids, weights and structures that are not of these tokens and experts."""
    num_tokens, beside = hidden_states.shape[0], ("hidden_states", hidden_states)
    topk_ids = routing.topk_ids
    top_k = topk_ids.shape[1] if isinstance(topk_ids, torch.Tensor) and topk_ids.dim() == 2 else None
    check_tensor("topk_ids", topk_ids, (num_tokens, top_k), IDS_DTYPES, beside)
    check_tensor("topk_weights", routing.topk_weights, (num_tokens, top_k), WEIGHTS_DTYPES, beside)
    if topk_ids.shape[1] < 1:
        raise ValueError(f"topk_ids must be [T, K] with K of at least 1, got {list(topk_ids.shape)}")
    if num_tokens * topk_ids.shape[1] > _MOST_SLOTS:
        raise ValueError(
            f"topk_ids {list(topk_ids.shape)} makes more than {_MOST_SLOTS} slots, which int32 cannot count; pass "
            "fewer tokens at a time"
        )
    if any(structure is not None for structure in routing[2:]):
        _check_structures(routing, num_experts, beside)


def _check_structures(routing: Routing, num_experts: int, beside: tuple[str, torch.Tensor]) -> None:
    num_tokens, top_k = routing.topk_ids.shape
    shapes: dict[str, tuple[int, ...]] = {
        "tokens_per_expert": (num_experts,),
        "expert_offsets": (num_experts + 1,),
        "permuted_idx": (num_tokens * top_k,),
        "inv_permuted_idx": (num_tokens, top_k),
        "num_tokens_post_padded": (1,),
    }
    for name, structure in zip(STRUCTURES, routing[2:], strict=True):
        if structure is not None:
            shape, dtypes = shapes.get(name, structure.shape), _STRUCTURES_DTYPES.get(name, STRUCTURES_DTYPES)
            check_tensor(name, structure, shape, dtypes, beside)
