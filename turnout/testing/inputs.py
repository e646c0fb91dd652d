"""Logits by name, and output buffers that show what was written: what tests and benchmarks feed to routing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from turnout.contracts import Contract
from turnout.types import Routing

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_INF = float("inf")
_GUARD = 64  # elements before and after a poisoned buffer
# Bytes that no right result consists of: ids out of any range and no usual sentinel, weights NaN.
_IDS_POISON, _WEIGHTS_POISON = 0xA5, 0xFF

Maker = Callable[[torch.Generator, int, int, torch.dtype], torch.Tensor]


def _tie_free(rng: torch.Generator, num_tokens: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    # Neighbouring bfloat16 values around zero, which all three dtypes hold exactly, in random order.
    magnitude = torch.arange(num_experts) // 2 + 0x3E80  # from 0.25 on
    values = magnitude.to(torch.int16).view(torch.bfloat16).to(dtype)
    values = torch.where(torch.arange(num_experts) % 2 == 0, values, -values)
    return values[_shuffled(rng, num_tokens, num_experts)]


def _shuffled(rng: torch.Generator, num_tokens: int, num_experts: int) -> torch.Tensor:
    return torch.rand(num_tokens, num_experts, generator=rng).argsort(dim=-1)


def _normal(rng: torch.Generator, num_tokens: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(num_tokens, num_experts, generator=rng)).to(dtype)


def _bit_patterns(rng: torch.Generator, num_tokens: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    limits = torch.iinfo(_BITS[dtype])
    bits = torch.randint(limits.min, limits.max + 1, (num_tokens, num_experts), generator=rng)
    return bits.to(_BITS[dtype]).view(dtype)


def _nans(rng: torch.Generator, num_tokens: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    # Every payload and both signs: the exponent all ones, and a mantissa that is not zero.
    not_a_number = torch.tensor(_INF, dtype=dtype).view(_BITS[dtype]) | 1
    return (_bit_patterns(rng, num_tokens, num_experts, dtype).view(_BITS[dtype]) | not_a_number).view(dtype)


def _drawn_from(*values: float) -> Maker:
    """Logits that are each one of a few values."""

    def make(rng: torch.Generator, num_tokens: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
        drawn = torch.randint(len(values), (num_tokens, num_experts), generator=rng)
        return torch.tensor(values, dtype=dtype)[drawn]

    return make


def _with_a_few(inside: Maker, around: Maker, count: int) -> Maker:
    """``count`` logits of one kind in each row (at most E), at random places among those of another kind."""

    def make(rng: torch.Generator, num_tokens: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
        few = _shuffled(rng, num_tokens, num_experts) < count
        return torch.where(
            few, inside(rng, num_tokens, num_experts, dtype), around(rng, num_tokens, num_experts, dtype)
        )

    return make


def _largest(rng: torch.Generator, num_tokens: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    signs = torch.randint(2, (num_tokens, num_experts), generator=rng) * 2 - 1
    return (signs * torch.finfo(dtype).max * torch.rand(num_tokens, num_experts, generator=rng)).to(dtype)


def _subnormal(rng: torch.Generator, num_tokens: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    bits = torch.randint(-100, 101, (num_tokens, num_experts), generator=rng)
    magnitude = bits.abs().to(_BITS[dtype]).view(dtype)
    return torch.where(bits < 0, -magnitude, magnitude)


NAMED_LOGITS: dict[str, Maker] = {
    "normal": _normal,
    "tie_free": _tie_free,
    "quantised": _drawn_from(-1.5, -1.0, -0.5, 0.0, 0.5, 1.0),
    "all_equal": _drawn_from(0.75),
    "signed_zeros": _drawn_from(0.0, -0.0),
    "all_negative": _drawn_from(-30000.0, -2000.0, -150.0, -149.5, -149.0),
    "large_spread": _largest,
    "subnormal": _subnormal,
    "bit_patterns": _bit_patterns,
    "one_nan": _with_a_few(_nans, _normal, 1),
    "all_nan": _nans,
    "one_inf": _with_a_few(_drawn_from(_INF), _normal, 1),
    "some_infs": _with_a_few(_drawn_from(_INF), _normal, 3),
    "all_inf": _drawn_from(_INF),
    "all_minus_inf": _drawn_from(-_INF),
    "one_finite": _with_a_few(_normal, _drawn_from(-_INF), 1),
    "few_finite": _with_a_few(_normal, _nans, 3),
    "nan_and_minus_inf": _drawn_from(float("nan"), -_INF),
    "not_finite": _drawn_from(float("nan"), -_INF, _INF),
}
"""Makers of logits by name; `make_logits` calls them."""


def make_logits(
    name: str,
    num_tokens: int,
    num_experts: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> torch.Tensor:
    """Logits [T, E] of one kind, the same for the same arguments on any device.

    Args:
        name: one of `NAMED_LOGITS`.
        num_tokens: T.
        num_experts: E.
        dtype: float32, bfloat16 or float16.
        device: where the tensor is wanted; it is always drawn on the CPU.
        seed: of the random draw.
    """
    rng = torch.Generator().manual_seed(seed)
    return NAMED_LOGITS[name](rng, num_tokens, num_experts, dtype).to(device)


def every_kind_of_row(
    num_experts: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    names: Iterable[str] = tuple(NAMED_LOGITS),
    rows: int = 1,
) -> torch.Tensor:
    """``rows`` rows of each of the names, one after the other: [rows * len(names), E]."""
    return torch.cat([make_logits(name, rows, num_experts, dtype, device, seed) for seed, name in enumerate(names)])


class PoisonedBuffer(NamedTuple):
    """A contiguous buffer full of a byte no result is made of, between guards of the same byte."""

    memory: torch.Tensor  # [guard + n + guard] uint8
    tensor: torch.Tensor  # the buffer: a view into memory
    poison: int

    def is_untouched(self) -> bool:
        """Whether nothing was written, neither in the buffer nor around it."""
        return bool((self.memory == self.poison).all())

    def guards_hold(self) -> bool:
        """Whether nothing was written around the buffer."""
        size = _GUARD * self.tensor.element_size()
        guards = torch.cat([self.memory[:size], self.memory[size + self.tensor.nbytes :]])
        return bool((guards == self.poison).all())


class PoisonedOut(NamedTuple):
    """Poisoned buffers for the result of one `turnout.route`; ``out.tensors`` is its ``out=``."""

    topk_weights: PoisonedBuffer
    topk_ids: PoisonedBuffer

    @property
    def tensors(self) -> Routing:
        """The buffers as ``out=`` takes them."""
        return Routing(self.topk_weights.tensor, self.topk_ids.tensor)


def poisoned_buffer(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, poison: int
) -> PoisonedBuffer:
    """A contiguous buffer of this shape and dtype in which every byte is ``poison``."""
    count = torch.Size(shape).numel()
    memory = torch.full(((count + 2 * _GUARD) * dtype.itemsize,), poison, dtype=torch.uint8, device=device)
    return PoisonedBuffer(memory, memory.view(dtype)[_GUARD : _GUARD + count].view(shape), poison)


def poisoned_out(num_tokens: int, top_k: int, contract: Contract, device: torch.device | str = "cpu") -> PoisonedOut:
    """Buffers [T, K] in the contract's dtypes that `turnout.route` has yet to fill."""
    shape = (num_tokens, top_k)
    return PoisonedOut(
        poisoned_buffer(shape, contract.weights_dtype, device, _WEIGHTS_POISON),
        poisoned_buffer(shape, contract.ids_dtype, device, _IDS_POISON),
    )
