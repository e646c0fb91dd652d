"""``turnout.route``: what goes in, what is checked, which implementation runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from turnout.contracts import Contract
from turnout.device import MAX_KERNEL_EXPERTS
from turnout.impls import Choice, check_grad, check_impl, check_kind, check_tensor
from turnout.permutation import ops as _permutation  # registers the operators
from turnout.permutation.api import check_size, check_structures
from turnout.routing import ops as _ops  # registers the operators
from turnout.routing._checks import check_further_inputs, refuse_mismatch
from turnout.spec import RouterSpec
from turnout.types import Routing, RoutingInputs

IMPLS = ("reference", "triton", "cpu")
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_INPUTS = RoutingInputs()
# Values of the spec that describe a router, and that this station does not compute.
_UNSUPPORTED_FIELDS = ("renormalize_order", "num_shared_columns")


def route(
    router_logits: torch.Tensor,
    spec: RouterSpec,
    contract: Contract,
    inputs: RoutingInputs | None = None,
    *,
    out: Routing | Sequence[torch.Tensor] | None = None,
    impl: str = "auto",
) -> Routing:
    """Choose K of E experts for each token, and write ids, weights and structures as the consumer reads them.

    One launch on a GPU, one pass over each row on a CPU, which store ids and weights in the contract's dtypes; with
    them the contract's structures for at most 1024 slots; those of more slots come from `turnout.permute` after it.

    For any bit pattern of the logits the K ids of a row are distinct and in range, in descending order of what the spec
    ranks (ties to the lowest id, NaN below every number), and the weights are finite (for finite scales whose product
    with a weight its dtype holds): of a softmax, entries of +inf share the mass, -inf and NaN get 0; where nothing that
    was selected has any weight, all K share alike. A row's weights and logical ids do not depend on the other rows.

    Args:
        router_logits: [T, E] float32, bfloat16 or float16; rows may be strided, T may be 0.
        spec: what the model computes.
        contract: what the consumer reads.
        inputs: the per-call tensors that spec and contract name, and padding, forced ids, load or replay, if any.
        out: buffers to write into: a `Routing` or ``(topk_weights, topk_ids)``, contiguous [T, K] of the
            contract's dtypes on the logits' device.
        impl: ``"auto"``, or one of ``"reference"``, ``"triton"``, ``"cpu"``; a named one runs or raises.

    Returns:
        `Routing` with ``topk_weights`` [T, K] and ``topk_ids`` [T, K], and the structures of the contract.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says what was given and what is wanted.
        NotImplementedError: the spec, contract or inputs ask for something by name that is not there yet.
    """
    inputs = _NO_INPUTS if inputs is None else inputs
    if not (type(spec) is RouterSpec and type(contract) is Contract and type(inputs) is RoutingInputs):
        _check_kinds(spec, contract, inputs)
    # A compiler sees through a cache, and warns of it.
    declarations = (check_declarations if torch.compiler.is_compiling() else prepare)(spec, contract)
    _check_logits(router_logits, spec)
    is_plain = _is_plain(inputs)
    _check_inputs(router_logits, spec, contract, inputs, is_plain)
    if impl == "auto":
        impl = choose_impl(router_logits, spec.num_experts).impl
    else:
        check_impl(impl, IMPLS)
    arguments: tuple[Any, ...] = (
        router_logits, declarations, impl, inputs.per_expert_scale, inputs.is_padding, inputs.num_valid_tokens,
        inputs.expert_map,
    )  # fmt: skip
    if not is_plain:
        arguments += _further_arguments(inputs)
    if contract.structures:
        _check_structures(router_logits, spec, contract, inputs, out)
        return _permutation.routing_of(_permutation.route_permuted(*arguments), contract)
    if out is None and inputs.expert_load is inputs.replay_ids is None:
        return Routing(*_ops.route(*arguments))
    return _route_into(_buffers(out, router_logits, spec, contract), arguments, inputs)


def _further_arguments(inputs: RoutingInputs) -> tuple[torch.Tensor | None, ...]:
    """The operators' arguments that most routers leave away."""
    given_ids = inputs.tid2eid if inputs.forced_ids is None else inputs.forced_ids
    return (
        inputs.e_score_correction_bias, inputs.input_ids, given_ids,
        inputs.logical_to_physical_map, inputs.logical_replica_count,
    )  # fmt: skip


def _route_into(
    buffers: tuple[torch.Tensor, torch.Tensor], arguments: tuple[Any, ...], inputs: RoutingInputs
) -> Routing:
    topk_weights, topk_ids = buffers
    _ops.route_out(
        *arguments, record_load=inputs.record_load, num_counted_tokens=inputs.num_counted_tokens,
        expert_load=inputs.expert_load, replay_ids=inputs.replay_ids, topk_weights=topk_weights, topk_ids=topk_ids,
    )  # fmt: skip
    return Routing(topk_weights, topk_ids)


def check_declarations(spec: RouterSpec, contract: Contract) -> str:
    """Check what can be checked before any tensor is seen; the result is what `route_prepared` takes.

    Raises:
        ValueError: spec and contract do not fit each other.
        NotImplementedError: one of them asks for something by name that is not there yet.
    """
    for field in dataclasses.fields(spec):
        if field.name in _UNSUPPORTED_FIELDS and getattr(spec, field.name) != field.default:
            raise NotImplementedError(
                f"route does not run {field.name}={getattr(spec, field.name)!r} yet (RouterSpec.{field.name})"
            )
    if contract.structures:
        check_structures(contract)
    if contract.id_space == "physical":
        _check_physical(contract)
    if contract.id_space == "local" and contract.num_local_experts is None:
        raise ValueError(
            "the contract counts the experts of one rank, and has num_local_experts=None; say how many those are: "
            "dataclasses.replace(contract, num_local_experts=16)"
        )
    num_ids = contract.num_ids(spec.num_experts)
    if num_ids - 1 > torch.iinfo(contract.ids_dtype).max:
        raise ValueError(
            f"ids_dtype={contract.ids_dtype} cannot hold the ids of {num_ids} experts; "
            "choose a contract with a wider dtype"
        )
    if isinstance(contract.sentinel, int) and 0 <= contract.sentinel < num_ids:
        raise ValueError(
            f"sentinel={contract.sentinel} is the id of an expert (num_experts={num_ids}); "
            "it must lie outside, for instance -1 or 'num_experts'"
        )
    if contract.sentinel == "num_experts" and num_ids > torch.iinfo(contract.ids_dtype).max:
        raise ValueError(f"ids_dtype={contract.ids_dtype} cannot hold the sentinel {num_ids}")
    return _ops.declarations(spec, contract)


def _check_physical(contract: Contract) -> None:
    if contract.structures:
        raise NotImplementedError(
            "route does not write structures of physical ids yet; leave Contract.structures empty"
        )
    if contract.sentinel == "num_experts":
        raise ValueError(
            "sentinel='num_experts' contradicts id_space='physical': the contract does not know how many physical "
            "experts there are; give the number itself, or -1"
        )


prepare = functools.cache(check_declarations)


def route_prepared(
    router_logits: torch.Tensor, prepared: str, per_expert_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` for integrations: the model itself made the tensors, so their shapes are not checked again.

    On a CPU the checks of `route` would cost as much as routing one token.

    Returns:
        ``topk_weights`` and ``topk_ids`` [T, K].

    Raises:
        ValueError: the logits require grad, or are of a dtype that `route` does not take.
    """
    if router_logits.dtype not in LOGITS_DTYPES:
        _refuse_dtype(router_logits)
    check_grad("router_logits", router_logits)
    impl = choose_impl(router_logits, router_logits.shape[1]).impl
    return _ops.route(router_logits, prepared, impl, per_expert_scale, None, None, None)


def choose_impl(tensor: torch.Tensor, num_experts: int) -> Choice:
    """The implementation that ``impl="auto"`` takes for logits where ``tensor`` lies, and the reason."""
    if tensor.is_cpu:
        return _CPU
    if not (tensor.is_cuda or tensor.is_xpu):  # "cuda" is what torch calls ROCm devices, too
        return Choice("reference", f"no kernel for device type {tensor.device.type!r}: plain torch operations")
    return _TRITON if num_experts <= MAX_KERNEL_EXPERTS else _TOO_MANY_EXPERTS


_CPU = Choice("cpu", "logits on a CPU: one pass over each row")
_TRITON = Choice("triton", "logits on a GPU: one launch")
_TOO_MANY_EXPERTS = Choice("reference", f"more than {MAX_KERNEL_EXPERTS} experts: plain torch operations")


def _check_kinds(spec: RouterSpec, contract: Contract, inputs: RoutingInputs) -> None:
    check_kind("spec", spec, RouterSpec)
    if not isinstance(contract, Contract):
        raise TypeError(
            f"contract must be a turnout.Contract, got {type(contract).__name__}; turnout.contracts[name] holds "
            "those of known consumers"
        )
    check_kind("inputs", inputs, RoutingInputs)


def _check_logits(router_logits: torch.Tensor, spec: RouterSpec) -> None:
    if not isinstance(router_logits, torch.Tensor):
        raise TypeError(f"router_logits must be a tensor [T, E], got {type(router_logits).__name__}")
    shape = router_logits.shape
    if len(shape) != 2:
        raise ValueError(
            f"router_logits must be [T, E], got shape {list(shape)}; flatten leading dimensions "
            f"with router_logits.view(-1, {spec.num_experts})"
        )
    if shape[1] != spec.num_experts:
        raise ValueError(f"router_logits has {shape[1]} columns, the spec has num_experts={spec.num_experts}")
    if router_logits.dtype not in LOGITS_DTYPES:
        _refuse_dtype(router_logits)
    # Asking for a stride takes longer than asking whether it matters.
    if not router_logits.is_contiguous() and router_logits.stride(1) != 1 and shape[1] > 1:
        raise ValueError(
            f"router_logits must have contiguous rows, got strides {router_logits.stride()}; rows may lie apart, "
            "columns may not: pass router_logits.contiguous() if the copy is meant"
        )
    check_grad("router_logits", router_logits)


def _refuse_dtype(router_logits: torch.Tensor) -> NoReturn:
    raise ValueError(f"router_logits must be float32, bfloat16 or float16, got {router_logits.dtype}")


def _is_plain(inputs: RoutingInputs) -> bool:
    """Whether the inputs are those of most routers; one chain of identities, since it runs at every call."""
    return (
        inputs.e_score_correction_bias is inputs.input_ids is inputs.tid2eid is inputs.forced_ids
        is inputs.logical_to_physical_map is inputs.logical_replica_count
        is inputs.expert_load is inputs.record_load is inputs.num_counted_tokens is inputs.replay_ids is None
    )  # fmt: skip


def _check_inputs(
    router_logits: torch.Tensor, spec: RouterSpec, contract: Contract, inputs: RoutingInputs, is_plain: bool
) -> None:
    beside = ("router_logits", router_logits)
    scale = inputs.per_expert_scale
    if (scale is None) == spec.per_expert_scale:
        refuse_mismatch("the spec", "per_expert_scale", spec.per_expert_scale, "per_expert_scale", scale)
    if scale is not None:
        check_tensor("per_expert_scale", scale, (spec.num_experts,), LOGITS_DTYPES, beside)
    if (inputs.expert_map is None) == (contract.id_space == "local"):
        refuse_mismatch("the contract", "id_space", contract.id_space, "expert_map", inputs.expert_map)
    if inputs.expert_map is not None:
        check_tensor("expert_map", inputs.expert_map, (spec.num_experts,), (torch.int32,), beside)
    if inputs.is_padding is not None or inputs.num_valid_tokens is not None:
        _check_padding(router_logits, contract, inputs)
    if not is_plain or spec.e_score_correction_bias or spec.hash_routing or contract.id_space == "physical":
        check_further_inputs(router_logits, spec, contract, inputs)


def _check_structures(
    router_logits: torch.Tensor, spec: RouterSpec, contract: Contract, inputs: RoutingInputs, out: object
) -> None:
    check_size(router_logits.shape[0], spec.top_k, contract.num_ids(spec.num_experts), contract)
    if inputs.replay_ids is not None:
        raise NotImplementedError(
            "route does not write replay_ids beside structures yet; pass a contract with structures=()"
        )
    if out is not None:
        raise NotImplementedError(
            f"route does not write {', '.join(contract.structures)} into buffers yet; leave out= away, or pass "
            "dataclasses.replace(contract, structures=()) for ids and weights alone"
        )


def _check_padding(router_logits: torch.Tensor, contract: Contract, inputs: RoutingInputs) -> None:
    num_tokens, beside = router_logits.shape[0], ("router_logits", router_logits)
    if inputs.is_padding is not None:
        check_tensor("is_padding", inputs.is_padding, (num_tokens,), (torch.bool,), beside)
    if inputs.num_valid_tokens is not None:
        check_tensor("num_valid_tokens", inputs.num_valid_tokens, (1,), (torch.int32,), beside)
    if contract.sentinel is None:
        raise ValueError(
            "padding needs a contract with a sentinel, and this one has sentinel=None; "
            "give the id that the consumer skips, for instance Contract(..., sentinel=-1)"
        )


def _buffers(
    out: Routing | Sequence[torch.Tensor] | None, router_logits: torch.Tensor, spec: RouterSpec, contract: Contract
) -> tuple[torch.Tensor, torch.Tensor]:
    """The buffers given, checked, or new ones."""
    if out is None:
        return _ops.allocate(router_logits, spec, contract)
    if not isinstance(out, Sequence):
        raise TypeError(f"out must be a turnout.Routing or (topk_weights, topk_ids), got {type(out).__name__}")
    buffers = [buffer for buffer in out if buffer is not None]
    if len(buffers) != 2:
        raise ValueError(f"out must hold topk_weights and topk_ids, got {len(buffers)} buffers")
    shape, beside = (router_logits.shape[0], spec.top_k), ("router_logits", router_logits)
    check_tensor("out.topk_weights", buffers[0], shape, (contract.weights_dtype,), beside)
    check_tensor("out.topk_ids", buffers[1], shape, (contract.ids_dtype,), beside)
    return buffers[0], buffers[1]
