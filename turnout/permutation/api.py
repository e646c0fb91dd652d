"""``turnout.permute``: what goes in, what is checked, which implementation runs."""

from __future__ import annotations

import torch

from turnout.contracts import IDS_DTYPES, PADDED_BLOCK_MAP, Contract
from turnout.device import MAX_KERNEL_EXPERTS, SCHEDULE_BLOCK_SIZES
from turnout.impls import Choice, check_grad, check_impl, check_kind, check_tensor
from turnout.permutation import ops as _ops  # registers the operator
from turnout.types import Permutation

IMPLS = ("reference", "triton", "cpu")
# Positions are computed in 32 bits.
MAX_POSITIONS = 2**31 - 1
# A schedule keeps the number of a block inside its expert in 15 bits; an expert has one slot of each token at most.
MAX_SCHEDULED_TOKENS = 2**15 * SCHEDULE_BLOCK_SIZES[0]


def permute(
    topk_ids: torch.Tensor,
    num_experts: int,
    contract: Contract,
    *,
    topk_weights: torch.Tensor | None = None,
    impl: str = "auto",
) -> Permutation:
    """Order the slots of a routing by expert, and write the structures that a consumer reads.

    The order is that of a stable sort: inside an expert, slots keep theirs. Slots whose id lies outside of
    [0, num_experts) are skipped. On a GPU that is one launch for at most 1024 slots and two for more, on a CPU one pass
    to count and one to place.

    Args:
        topk_ids: [T, K] int16, int32, uint32 or int64, contiguous; T may be 0. A row may name
            an expert twice; ``block_schedule`` is right for at most 2^15 blocks of 16 slots of one expert.
        num_experts: E.
        contract: its structures, structures_dtype and block_size say what is written.
        topk_weights: [T, K] of the contract's weights_dtype; for ``permuted_weights`` alone.
        impl: ``"auto"``, or one of ``"reference"``, ``"triton"``, ``"cpu"``; a named one runs or raises.

    Returns:
        `Permutation` with the structures of the contract; the others are None.

    Raises:
        ValueError: an argument does not fit the others; the message says what was given and what is wanted. There may
            be 2^31 - 1 slots, those that pad blocks included.
        TypeError: an argument is not of its type.

    Example:
        >>> contract = Contract(structures=("permuted_idx",))
        >>> permute(torch.tensor([[2, 0], [2, 1]]), 3, contract).permuted_idx
        tensor([1, 3, 0, 2], dtype=torch.int32)
    """
    check_kind("contract", contract, Contract)
    _check_ids(topk_ids, num_experts)
    check_structures(contract)
    check_size(topk_ids.shape[0], topk_ids.shape[1], num_experts, contract)
    _check_weights(topk_weights, topk_ids, contract)
    if impl == "auto":
        impl = choose_impl(topk_ids, num_experts).impl
    else:
        check_impl(impl, IMPLS)
    buffers = _ops.permute(topk_ids, topk_weights, num_experts, contract.key, impl)
    return _ops.permutation_of(buffers, contract)


def check_structures(contract: Contract) -> None:
    """Refuse a contract whose structures cannot be written.

    Raises:
        ValueError: it asks for none, or for a padded block map without saying how large the blocks are.
    """
    if not contract.structures:
        raise ValueError(
            "the contract asks for no structures; name them: Contract(structures=('permuted_idx', 'expert_offsets'))"
        )
    padded = [name for name in contract.structures if name in PADDED_BLOCK_MAP]
    if padded and contract.block_size is None:
        raise ValueError(
            f"the contract asks for {', '.join(padded)} and has block_size=None: this consumer chooses the size of its "
            "blocks at each call. Say which it is: dataclasses.replace(contract, block_size=64)"
        )


def check_size(num_tokens: int, top_k: int, num_experts: int, contract: Contract) -> None:
    """Refuse more slots than there can be positions.

    Raises:
        ValueError: T * K and the padding of the blocks, or what a schedule holds, is exceeded.
    """
    num_slots = num_tokens * top_k
    # More than there are even where each expert pads a block: the check of every call takes no minimum.
    if num_slots + num_experts * (contract.block_size or 1) > MAX_POSITIONS:
        raise ValueError(
            f"{num_tokens} tokens of {top_k} experts in blocks of {contract.block_size or 1} slots are more than "
            f"{MAX_POSITIONS} positions; split the batch"
        )
    if num_tokens >= MAX_SCHEDULED_TOKENS and "block_schedule" in contract.structures:
        raise ValueError(
            f"block_schedule numbers an expert's blocks in 15 bits: fewer than {MAX_SCHEDULED_TOKENS} tokens, got "
            f"{num_tokens}; split the batch"
        )


def choose_impl(tensor: torch.Tensor, num_experts: int) -> Choice:
    """The implementation that ``impl="auto"`` takes for ids where ``tensor`` lies, and the reason."""
    if tensor.is_cpu:
        return Choice("cpu", "ids on a CPU: a counting sort")
    if not (tensor.is_cuda or tensor.is_xpu):  # "cuda" is what torch calls ROCm devices, too
        return Choice("reference", f"no kernel for device type {tensor.device.type!r}: plain torch operations")
    if num_experts > MAX_KERNEL_EXPERTS:
        return Choice("reference", f"more than {MAX_KERNEL_EXPERTS} experts: plain torch operations")
    return Choice("triton", "ids on a GPU: at most two launches")


def _check_ids(topk_ids: torch.Tensor, num_experts: int) -> None:
    check_kind("topk_ids", topk_ids, torch.Tensor)
    check_tensor("topk_ids", topk_ids, (None, None), IDS_DTYPES, ("topk_ids", topk_ids))
    if topk_ids.shape[1] < 1:
        raise ValueError(f"topk_ids must be [T, K] with K of at least 1, got {list(topk_ids.shape)}")
    if type(num_experts) is not int or num_experts < 1:
        raise ValueError(f"num_experts must be a positive int, got {num_experts!r}")


def _check_weights(topk_weights: torch.Tensor | None, topk_ids: torch.Tensor, contract: Contract) -> None:
    wanted = "permuted_weights" in contract.structures
    if wanted != (topk_weights is not None):
        raise ValueError(
            f"the contract asks for {'' if wanted else 'no '}permuted_weights, but topk_weights is "
            f"{'missing' if wanted else 'given'}"
        )
    if topk_weights is not None:
        shape, dtypes = tuple(topk_ids.shape), (contract.weights_dtype,)
        check_tensor("topk_weights", topk_weights, shape, dtypes, ("topk_ids", topk_ids))
        check_grad("topk_weights", topk_weights)
