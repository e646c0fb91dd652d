"""Ids, maps and rows, poisoned buffers and an oracle for the remap tests."""

import numpy as np
import torch

from turnout.remap.api import Remapped
from turnout.testing.inputs import poisoned_buffer

ROUTINGS = ("uniform", "skewed", "one_hot", "empty_experts")


def make_ids(kind, num_tokens, top_k, num_experts, dtype=torch.int64, device="cpu", seed=0):
    """Ids [T, K], distinct in a row: of random experts; mostly of few; of one and others; of the lower half alone."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=rng)
    if kind == "skewed":
        scores = scores * torch.linspace(1, 0.05, num_experts)
    elif kind == "one_hot":
        scores[:, num_experts // 2] = 2.0
    elif kind == "empty_experts":
        scores[:, max(top_k, num_experts // 2) :] = -1.0
    return scores.argsort(dim=-1, descending=True)[:, :top_k].to(dtype).to(device).contiguous()


def make_map(num_total, num_experts, device="cpu", seed=0):
    """A map of so many experts of all ranks to those of this one, in no order."""
    rng = torch.Generator().manual_seed(seed)
    expert_map = torch.full((num_total,), -1, dtype=torch.int32)
    expert_map[torch.randperm(num_total, generator=rng)[:num_experts]] = torch.arange(num_experts, dtype=torch.int32)
    return expert_map.to(device)


def make_rows(num_tokens, columns, dtype, device="cpu", seed=0):
    """Rows of random bits: NaN with payloads, infinities and subnormals among them."""
    rng = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (num_tokens, columns * dtype.itemsize), dtype=torch.uint8, generator=rng)
    return data.view(dtype).to(device)


def bits(tensor):
    """The bits of a tensor as a numpy array of integers."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    return tensor.cpu().view(integers).numpy()


def oracle(hidden_states, topk_ids, num_experts, expert_map=None, scales=None):
    """The results as numpy arrays, from the rules: one list of slots for each expert, in the order of the slots."""
    slots_of = [[] for _ in range(num_experts)]
    expert_map = None if expert_map is None else expert_map.tolist()
    for slot, expert in enumerate(topk_ids.flatten().tolist()):
        if expert_map is not None:
            expert = expert_map[expert] if 0 <= expert < len(expert_map) else -1
        if 0 <= expert < num_experts:
            slots_of[expert].append(slot)
    order = [slot for slots in slots_of for slot in slots]
    positions = np.full(topk_ids.numel(), -1, dtype=np.int32)
    positions[order] = np.arange(len(order))

    def rows_of(source):
        rows = np.zeros((topk_ids.numel(), source.shape[1]), dtype=bits(source).dtype)
        rows[: len(order)] = bits(source)[np.array(order, dtype=np.int64) // topk_ids.shape[1]]
        return rows

    counts = np.array([len(slots) for slots in slots_of], dtype=np.int32)
    return (
        rows_of(hidden_states), counts, positions.reshape(topk_ids.shape), None if scales is None else rows_of(scales)
    )  # fmt: skip


def poisoned_remapped(hidden_states, topk_ids, num_experts, scales=None):
    """Poisoned buffers, one for each result."""
    slots, device = topk_ids.numel(), hidden_states.device
    return Remapped(
        poisoned_buffer((slots, hidden_states.shape[1]), hidden_states.dtype, device, 0xA5),
        poisoned_buffer((num_experts,), torch.int32, device, 0x7B),
        poisoned_buffer(tuple(topk_ids.shape), torch.int32, device, 0x7B),
        None if scales is None else poisoned_buffer((slots, scales.shape[1]), scales.dtype, device, 0xA5),
    )
