"""What a right permutation is: an oracle in plain Python that shares no code with any implementation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from turnout.contracts import Contract
from turnout.testing.inputs import PoisonedBuffer, poisoned_buffer
from turnout.types import Permutation, Routing

Array = npt.NDArray[np.generic]
_SCHEDULED = (16, 32, 64, 128, 256)
_POISON = 0xA5


def make_ids(
    kind: str,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype = torch.int32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Ids [T, K], those of experts distinct in a row; the same for the same arguments on any device.

    Args:
        kind: ``"uniform"``; ``"skewed"``: low ids more often; ``"one_hot"``: the last expert in every row;
            ``"few"``: the first K alone, so that the others stay empty; ``"sentinels"``: a third of them no expert's,
            below, just past and far past the range; ``"idle"``: all just past it.
        num_tokens: T.
        num_experts: E.
        top_k: K.
        dtype: of the ids.
        device: where they are wanted.
    """
    rng = torch.Generator().manual_seed(num_tokens + num_experts)
    scores = torch.rand(num_tokens, num_experts, generator=rng)
    if kind == "skewed":
        scores = scores ** torch.linspace(0.1, 4, num_experts)
    elif kind == "one_hot":
        scores[:, -1] = 2
    elif kind == "few":
        scores[:, :top_k] += 2
    ids = scores.argsort(dim=-1, descending=True)[:, :top_k]
    if kind in ("sentinels", "idle"):
        far = torch.iinfo(dtype).max
        outside = torch.tensor([far if dtype == torch.uint32 else -1, num_experts, num_experts + 5, far])
        drawn = outside[torch.randint(4, ids.shape, generator=rng)]
        ids = torch.where(torch.rand(ids.shape, generator=rng) < 1 / 3, drawn, ids)
    if kind == "idle":
        ids = torch.full_like(ids, num_experts)
    return ids.to(dtype).contiguous().to(device)


def assert_permutation_matches(
    permutation: Permutation | Routing,
    topk_ids: torch.Tensor,
    num_experts: int,
    contract: Contract,
    topk_weights: torch.Tensor | None = None,
) -> None:
    """Assert that the structures are those that the contract asks for, of its dtypes, and equal the oracle's."""
    for name, want in oracle(topk_ids, num_experts, contract, topk_weights).items():
        got = getattr(permutation, name)
        if name not in contract.structures:
            assert got is None, f"{name} was not asked for"
            continue
        own = {"bitmatrix": torch.uint32, "permuted_weights": contract.weights_dtype}
        dtype = own.get(name, contract.structures_dtype)
        assert got.dtype == dtype, f"{name} is {got.dtype}, not {dtype}"
        assert got.shape == want.shape, f"{name} has shape {tuple(got.shape)}, not {want.shape}"
        assert got.device == topk_ids.device, f"{name} is on {got.device}"
        assert got.is_contiguous(), f"{name} has strides {got.stride()}"
        values = got.cpu().double().numpy() if got.dtype.is_floating_point else got.cpu().numpy()
        assert np.array_equal(values, want), f"{name}: got {values}, want {want}"


def oracle(
    topk_ids: torch.Tensor, num_experts: int, contract: Contract, topk_weights: torch.Tensor | None = None
) -> dict[str, Array]:
    """Every structure that these ids have, by name; those of blocks where the contract says how large they are."""
    ids = topk_ids.cpu().numpy().astype(np.int64)
    num_slots = ids.size
    slots_of: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < num_experts:
            slots_of[expert].append(slot)
    order = [slot for slots in slots_of for slot in slots]
    inverse = np.full(num_slots, -1, dtype=np.int64)
    inverse[order] = np.arange(len(order))
    unused = [-1] * (num_slots - len(order))
    counts = [len(slots) for slots in slots_of]
    words = np.zeros((len(ids), -(-num_experts // 32)), dtype=np.uint32)
    for expert, slots in enumerate(slots_of):
        for slot in slots:
            words[slot // ids.shape[1], expert // 32] |= np.uint32(1 << expert % 32)
    structures: dict[str, Array] = {
        "tokens_per_expert": np.array(counts),
        "expert_offsets": np.cumsum([0, *counts]),
        "permuted_idx": np.array(order + unused, dtype=np.int64),
        "inv_permuted_idx": inverse.reshape(ids.shape),
        "bitmatrix": words,
        "block_offsets": np.array([np.cumsum([0, *(-(-c // size) for c in counts)]) for size in _SCHEDULED]),
        "block_schedule": _schedule(counts, num_slots),
    }
    if topk_weights is not None:
        weights = topk_weights.cpu().double().flatten().numpy()
        structures["permuted_weights"] = np.array([*weights[order], *(0.0 for _ in unused)])
    if contract.block_size is not None:
        structures |= _padded_block_map(slots_of, num_slots, contract.block_size)
    return structures


def most_blocks(num_slots: int, num_experts: int, block_size: int) -> int:
    """Blocks at most: every expert that can have a slot has one, and the other slots fill blocks."""
    started = min(num_slots, num_experts)
    return started + (num_slots - started) // block_size


def _schedule(counts: list[int], num_slots: int) -> Array:
    rows = []
    for size in _SCHEDULED:
        row = [block << 16 | expert for expert, count in enumerate(counts) for block in range(-(-count // size))]
        rows.append(row + [-1] * (most_blocks(num_slots, len(counts), _SCHEDULED[0]) - len(row)))
    return np.array(rows, dtype=np.int64)


def _padded_block_map(slots_of: list[list[int]], num_slots: int, block_size: int) -> dict[str, Array]:
    blocks, experts = [], []
    for expert, slots in enumerate(slots_of):
        for start in range(0, len(slots), block_size):
            block = slots[start : start + block_size]
            blocks.append(block + [num_slots] * (block_size - len(block)))
            experts.append(expert)
    unused = most_blocks(num_slots, len(slots_of), block_size) - len(blocks)
    return {
        "sorted_token_ids": np.array([*blocks, *[[num_slots] * block_size] * unused], dtype=np.int64).flatten(),
        "expert_ids": np.array(experts + [-1] * unused, dtype=np.int64),
        "num_tokens_post_padded": np.array([len(blocks) * block_size]),
    }


class PoisonedAllocation(NamedTuple):
    """Buffers that an operator was given for its results, each full of a byte that no result is made of."""

    buffers: list[PoisonedBuffer]

    @classmethod
    def like(cls, tensors: list[torch.Tensor]) -> PoisonedAllocation:
        """Poisoned buffers of the same shapes, dtypes and devices."""
        return cls([poisoned_buffer(tuple(t.shape), t.dtype, t.device, _POISON) for t in tensors])

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the operator writes into."""
        return [buffer.tensor for buffer in self.buffers]
