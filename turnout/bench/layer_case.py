"""What a layer's benchmark runs on: weights of several layers, inputs of several batches, a known routing."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from turnout.contracts import Contract
from turnout.routing.api import route
from turnout.spec import ExpertsSpec, RouterSpec
from turnout.types import ExpertsWeights, Routing, RoutingInputs

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUTINGS = {
    "uniform": "logits are standard normal: each token's experts are drawn without preference",
    "skewed": "experts drawn without replacement, the r-th most popular with probability proportional to 1 / r; "
    "popularity differs by batch",
    "one_hot": "one expert, another in each batch, is the first choice of every token; the others as in uniform",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of the layer; the defaults are Gemma 4 26B-A4B's.

    Attributes:
        num_experts: E.
        top_k: K.
        hidden_size: H.
        intermediate_size: I.
        activation: of `turnout.ExpertsSpec`.
        dtype: of hidden states and weights, by name; logits are float32.
    """

    num_experts: int = 128
    top_k: int = 8
    hidden_size: int = 2816
    intermediate_size: int = 704
    activation: str = "gelu_tanh"
    dtype: str = "bfloat16"

    @property
    def router_spec(self) -> RouterSpec:
        """Gemma 4's router after its projection: softmax, normalised weights, a scale for each expert."""
        return RouterSpec(num_experts=self.num_experts, top_k=self.top_k, renormalize=True, per_expert_scale=True)

    @property
    def experts_spec(self) -> ExpertsSpec:
        """Plain weights, with this activation."""
        return ExpertsSpec(activation=self.activation)  # type: ignore[arg-type]  # ExpertsSpec checks it

    def moved(self, num_tokens: int, experts: float) -> float:
        """Bytes that must be read or written: the weights of so many experts, hidden states in and out."""
        weights = 3 * self.intermediate_size * self.hidden_size * experts
        return (weights + 2 * num_tokens * self.hidden_size) * DTYPES[self.dtype].itemsize

    def operations(self, num_tokens: int) -> float:
        """Multiplications and additions of the GEMMs, for the tokens' experts alone."""
        return 2 * 3 * num_tokens * self.top_k * self.intermediate_size * self.hidden_size


class LayerInputs(NamedTuple):
    """What one call of the layer reads."""

    hidden_states: torch.Tensor  # [T, H]
    router_logits: torch.Tensor  # [T, E] float32
    weights: ExpertsWeights
    per_expert_scale: torch.Tensor  # [E]


class Case(NamedTuple):
    """One number of tokens: B batches and L layers, through which the calls of a graph rotate."""

    geometry: Geometry
    hidden_states: torch.Tensor  # [B, T, H]
    router_logits: torch.Tensor  # [B, T, E]
    layers: list[tuple[ExpertsWeights, torch.Tensor]]  # weights, per_expert_scale

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_states.shape[1]

    def at(self, i: int) -> LayerInputs:
        """What the i-th call reads."""
        batch, layer = i % len(self.hidden_states), i % len(self.layers)
        return LayerInputs(self.hidden_states[batch], self.router_logits[batch], *self.layers[layer])

    def routing(self, i: int) -> Routing:
        """The right routing of the i-th call."""
        given = self.at(i)
        return route(
            given.router_logits,
            self.geometry.router_spec,
            Contract(ids_dtype=torch.int64),
            RoutingInputs(per_expert_scale=given.per_expert_scale),
            impl="reference",
        )

    def distinct_experts(self) -> float:
        """How many experts a batch chooses between all its tokens: the mean over the batches."""
        counts: list[int] = [self.routing(i).topk_ids.unique().numel() for i in range(len(self.hidden_states))]
        return sum(counts) / len(counts)


def draw_layers(
    geometry: Geometry, count: int, generator: torch.Generator
) -> list[tuple[ExpertsWeights, torch.Tensor]]:
    """Weights and per-expert scales of so many layers, such that values keep the size of the hidden states."""
    experts, hidden, inner = geometry.num_experts, geometry.hidden_size, geometry.intermediate_size

    def drawn(*shape: int) -> torch.Tensor:
        weight = torch.empty(shape, dtype=DTYPES[geometry.dtype], device=generator.device)
        return weight.normal_(0, 1 / math.sqrt(shape[-1]), generator=generator)

    def scale() -> torch.Tensor:
        return torch.rand(experts, device=generator.device, generator=generator) + 0.5

    return [
        (ExpertsWeights(drawn(experts, 2 * inner, hidden), drawn(experts, hidden, inner)), scale())
        for _ in range(count)
    ]


def draw_case(
    geometry: Geometry,
    num_tokens: int,
    routing: str,
    layers: list[tuple[ExpertsWeights, torch.Tensor]],
    generator: torch.Generator,
) -> Case:
    """Hidden states and logits of as many batches as vary the experts chosen."""
    batches = 32 if num_tokens <= 64 else 4
    device = generator.device
    hidden = torch.randn(batches, num_tokens, geometry.hidden_size, device=device, generator=generator)
    logits = torch.stack([_logits(geometry, num_tokens, routing, generator) for _ in range(batches)])
    return Case(geometry, hidden.to(DTYPES[geometry.dtype]), logits, layers)


def _logits(geometry: Geometry, num_tokens: int, routing: str, generator: torch.Generator) -> torch.Tensor:
    """[T, E] float32, distributed as `ROUTINGS` says."""
    experts, device = geometry.num_experts, generator.device
    shape = (num_tokens, experts)
    if routing == "skewed":  # the largest K of log(p) + Gumbel noise are a draw without replacement
        noise = -torch.empty(shape, device=device).exponential_(generator=generator).log()
        rank = torch.randperm(experts, device=device, generator=generator) + 1
        return noise - rank.log()
    logits = torch.randn(shape, device=device, generator=generator)
    if routing == "one_hot":
        logits[:, torch.randint(experts, (1,), device=device, generator=generator)] += 16
    return logits
