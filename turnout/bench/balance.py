"""How evenly tokens spread over experts: whoever measures should say, since an uneven load is a lighter one."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance:
    """The spread of some tokens over the experts of some layers.

    Attributes:
        entropy: of tokens_per_expert over the logarithm of the number of experts: 1 is even; mean over the layers.
        least_entropy: of the layer that is least even.
        busiest: tokens of the busiest expert over the mean, in the layer where that is most.
    """

    entropy: float
    least_entropy: float
    busiest: float


def balance_of(tokens_per_expert: Iterable[torch.Tensor]) -> Balance:
    """The balance of layers, each given as [E] counts."""
    counts = [each.double() for each in tokens_per_expert]
    entropies = [float(torch.special.entr(each / each.sum()).sum()) / math.log(len(each)) for each in counts]
    return Balance(
        entropy=statistics.mean(entropies),
        least_entropy=min(entropies),
        busiest=max(float(each.max() / each.mean()) for each in counts),
    )
