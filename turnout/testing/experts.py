"""Experts to test and measure with: inputs by name, an oracle, and how far from it a result may lie.

The oracle works in float64 and shares no code with any implementation. The tolerance is derived, not guessed: a result
may err twice as much as a plain run in the same dtype does, plus one rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing

ERROR_RATIO = 2.0  # of a plain run in the dtype of the hidden states, against float64

Floats = npt.NDArray[np.float64]
Chooser = Callable[[torch.Generator, int, int, int], torch.Tensor]

GPT_OSS = ExpertsSpec(
    activation_alpha=1.702, activation_limit=7.0, up_offset=1.0, transposed=True, interleaved=True, bias=True
)
SPECS: dict[str, ExpertsSpec] = {
    "silu": ExpertsSpec(),
    "gelu": ExpertsSpec(activation="gelu", bias=True),
    "gelu_tanh": ExpertsSpec(activation="gelu_tanh"),
    "gpt_oss": GPT_OSS,
    "transposed": ExpertsSpec(activation="gelu_tanh", transposed=True),
    "interleaved": ExpertsSpec(interleaved=True, bias=True, activation_limit=1.5),
}
"""Experts by name: between them every activation and every layout."""


def _popular(rng: torch.Generator, popularity: torch.Tensor, num_tokens: int, top_k: int) -> torch.Tensor:
    """K distinct experts for each token, drawn one after the other with these probabilities."""
    noise = torch.empty(num_tokens, len(popularity)).exponential_(generator=rng)
    return (noise / popularity).argsort(dim=-1)[:, :top_k].contiguous()


def _uniform(rng: torch.Generator, num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    return _popular(rng, torch.ones(num_experts), num_tokens, top_k)


def _skewed(rng: torch.Generator, num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    rank = torch.randperm(num_experts, generator=rng) + 1
    return _popular(rng, 1 / rank, num_tokens, top_k)


def _one_hot_expert(rng: torch.Generator, num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    hot = int(torch.randint(num_experts, (1,), generator=rng))
    popularity = torch.ones(num_experts)
    popularity[hot] = 1e12
    return _popular(rng, popularity, num_tokens, top_k)


def _empty_experts(rng: torch.Generator, num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    used = torch.randperm(num_experts, generator=rng)[: max(top_k, num_experts // 2)]
    return used[_uniform(rng, num_tokens, len(used), top_k)]


NAMED_ROUTINGS: dict[str, Chooser] = {
    "uniform": _uniform,  # without preference
    "skewed": _skewed,  # the r-th most popular expert has a weight of 1 / r
    "one_hot_expert": _one_hot_expert,  # one expert is the first choice of every token, the others as in uniform
    "empty_experts": _empty_experts,  # half of the experts are chosen by nobody
}
"""Choosers of experts by name; `make_routing` calls them."""


def make_routing(
    name: str,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    ids_dtype: torch.dtype = torch.int32,
    weights_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Routing:
    """A routing of one kind on the CPU, without structures; the weights of a token sum to about 1.

    Args:
        name: one of `NAMED_ROUTINGS`.
        num_tokens: T.
        num_experts: E.
        top_k: K.
        ids_dtype: of ``topk_ids``.
        weights_dtype: of ``topk_weights``.
        seed: of the random draw.
    """
    rng = torch.Generator().manual_seed(seed)
    ids = NAMED_ROUTINGS[name](rng, num_tokens, num_experts, top_k)
    weights = torch.rand(num_tokens, top_k, generator=rng) + 0.05
    return Routing((weights / weights.sum(-1, keepdim=True)).to(weights_dtype), ids.to(ids_dtype))


def make_weights(
    spec: ExpertsSpec,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ExpertsWeights:
    """Plain weights on the CPU in the layout of the spec, such that values keep the size of the hidden states."""
    rng = torch.Generator().manual_seed(seed)

    def weight(outputs: int, depth: int) -> torch.Tensor:
        shape = (depth, outputs) if spec.transposed else (outputs, depth)
        return (torch.randn(num_experts, *shape, generator=rng) / math.sqrt(depth)).to(dtype)

    def bias(outputs: int) -> torch.Tensor | None:
        return torch.randn(num_experts, outputs, generator=rng).to(dtype) if spec.bias else None

    return ExpertsWeights(
        weight(2 * intermediate_size, hidden_size),
        weight(hidden_size, intermediate_size),
        bias(2 * intermediate_size),
        bias(hidden_size),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsCase:
    """One call of `turnout.experts`; `make` draws its tensors.

    Attributes:
        num_tokens: T.
        num_experts: E.
        top_k: K.
        hidden_size: H.
        intermediate_size: I.
        spec: one of `SPECS`.
        routing: one of `NAMED_ROUTINGS`.
        dtype: of hidden states and weights.
        ids_dtype: of ``topk_ids``.
        weights_dtype: of ``topk_weights``.
        seed: of all random draws.
    """

    num_tokens: int
    num_experts: int = 6
    top_k: int = 2
    hidden_size: int = 40
    intermediate_size: int = 24
    spec: str = "gelu_tanh"
    routing: str = "uniform"
    dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int32
    weights_dtype: torch.dtype = torch.float32
    seed: int = 0

    def make(self, device: torch.device | str = "cpu") -> ExpertsInputs:
        """The tensors, the same for the same case on any device."""
        rng = torch.Generator().manual_seed(self.seed)
        spec = SPECS[self.spec]
        sizes = (self.num_experts, self.hidden_size, self.intermediate_size)
        weights = make_weights(spec, *sizes, self.dtype, self.seed)
        dtypes = (self.ids_dtype, self.weights_dtype)
        routing = make_routing(self.routing, self.num_tokens, self.num_experts, self.top_k, *dtypes, self.seed)
        hidden_states = torch.randn(self.num_tokens, self.hidden_size, generator=rng).to(self.dtype)
        return ExpertsInputs(hidden_states, weights, routing, spec).to(device)

    def __str__(self) -> str:
        """The fields that differ from their defaults, as the name of a test."""
        stated = [
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return "-".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in stated)


@dataclasses.dataclass(frozen=True)
class ExpertsInputs:
    """The arguments of `turnout.experts`."""

    hidden_states: torch.Tensor
    weights: ExpertsWeights
    routing: Routing
    spec: ExpertsSpec

    def to(self, device: torch.device | str) -> ExpertsInputs:
        """The same on another device."""
        weights = (None if weight is None else weight.to(device) for weight in self.weights)
        routing = (None if tensor is None else tensor.to(device) for tensor in self.routing)
        return ExpertsInputs(
            self.hidden_states.to(device), ExpertsWeights(*weights), Routing(*routing), self.spec  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def arguments(self) -> tuple[torch.Tensor, ExpertsWeights, Routing, ExpertsSpec]:
        """As `turnout.experts` takes them."""
        return self.hidden_states, self.weights, self.routing, self.spec

    def rows(self, index: slice | torch.Tensor) -> ExpertsInputs:
        """Some of the tokens, or all in another order."""
        routing = Routing(self.routing.topk_weights[index], self.routing.topk_ids[index])
        return dataclasses.replace(self, hidden_states=self.hidden_states[index], routing=routing)


def oracle(inputs: ExpertsInputs) -> Floats:
    """The exact output [T, H] in float64; slots whose id is no expert, or whose weight is 0, count nothing."""
    hidden = _float64(inputs.hidden_states)
    ids, slot_weights = inputs.routing.topk_ids.cpu().numpy().astype(np.int64), _float64(inputs.routing.topk_weights)
    gate_up_proj, down_proj = _float64(inputs.weights.gate_up_proj), _float64(inputs.weights.down_proj)
    if not inputs.spec.transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(0, 2, 1), down_proj.transpose(0, 2, 1)
    out = np.zeros(hidden.shape)
    for expert in range(len(down_proj)):
        tokens, choices = np.nonzero((ids == expert) & (slot_weights != 0))
        if len(tokens) == 0:
            continue
        gate_up = hidden[tokens] @ gate_up_proj[expert]
        if inputs.weights.gate_up_bias is not None:
            gate_up += _float64(inputs.weights.gate_up_bias)[expert]
        outputs = _activated(gate_up, inputs.spec) @ down_proj[expert]
        if inputs.weights.down_bias is not None:
            outputs += _float64(inputs.weights.down_bias)[expert]
        np.add.at(out, tokens, slot_weights[tokens, choices, None] * outputs)
    return out


def _activated(gate_up: Floats, spec: ExpertsSpec) -> Floats:
    half = gate_up.shape[1] // 2
    gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if spec.interleaved else (gate_up[:, :half], gate_up[:, half:])
    if spec.activation_limit is not None:
        gate, up = np.minimum(gate, spec.activation_limit), np.clip(up, -spec.activation_limit, spec.activation_limit)
    if spec.activation == "silu":
        shares = 1 / (1 + np.exp(-spec.activation_alpha * gate))
    elif spec.activation == "gelu_tanh":
        shares = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        shares = 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(gate / math.sqrt(2)))
    return np.asarray(gate * shares * (up + spec.up_offset), dtype=np.float64)


def plain_run(inputs: ExpertsInputs) -> torch.Tensor:
    """The experts one by one, each operation rounded to the dtype of the hidden states, as a stock model runs them."""
    hidden, weights, spec = inputs.hidden_states, inputs.weights, inputs.spec
    out = torch.zeros_like(hidden)
    ids, functional = inputs.routing.topk_ids.long(), torch.nn.functional
    for expert in range(len(weights.down_proj)):
        token, k = torch.nonzero(ids == expert, as_tuple=True)
        if len(token) == 0:
            continue
        gate_up_proj, down_proj = weights.gate_up_proj[expert], weights.down_proj[expert]
        if spec.transposed:
            gate_up_proj, down_proj = gate_up_proj.t(), down_proj.t()
        biases = [None if bias is None else bias[expert] for bias in (weights.gate_up_bias, weights.down_bias)]
        gate_up = functional.linear(hidden[token], gate_up_proj, biases[0])
        gate, up = gate_up.unflatten(1, (-1, 2)).unbind(2) if spec.interleaved else gate_up.chunk(2, dim=1)
        if spec.activation_limit is not None:
            gate = gate.clamp(max=spec.activation_limit)
            up = up.clamp(min=-spec.activation_limit, max=spec.activation_limit)
        if spec.activation == "silu":
            values = gate * torch.sigmoid(gate * spec.activation_alpha) * (up + spec.up_offset)
        else:
            approximate = "tanh" if spec.activation == "gelu_tanh" else "none"
            values = functional.gelu(gate, approximate=approximate) * (up + spec.up_offset)
        outputs = functional.linear(values, down_proj, biases[1])
        out.index_add_(0, token, (outputs * inputs.routing.topk_weights[token, k, None]).to(out.dtype))
    return out


def assert_accurate(out: torch.Tensor, inputs: ExpertsInputs) -> None:
    """Assert the form of an output, and that it errs at most twice as much as a plain run, plus one rounding.

    Both the largest error and the root of the mean square are held to that.
    """
    hidden = inputs.hidden_states
    assert out.shape == hidden.shape, f"the output is {list(out.shape)}, hidden states are {list(hidden.shape)}"
    assert out.dtype == hidden.dtype, f"the output is {out.dtype}, hidden states are {hidden.dtype}"
    assert out.device == hidden.device, f"the output is on {out.device}, hidden states on {hidden.device}"
    assert_within_tolerance(out, oracle(inputs), plain_run(inputs))


def assert_within_tolerance(out: torch.Tensor, exact: Floats, plain: torch.Tensor) -> None:
    """Assert that ``out`` errs at most twice as much as ``plain`` does, plus one rounding to its dtype."""
    if exact.size == 0:
        return
    got, rounding = _float64(out), torch.finfo(out.dtype).eps
    assert np.isfinite(got).all(), f"{np.count_nonzero(~np.isfinite(got))} of {got.size} values are not finite"
    for name, norm in (("largest", _largest), ("mean square", _root_mean_square)):
        error, plain_error = norm(got - exact), norm(_float64(plain) - exact)
        allowed = ERROR_RATIO * plain_error + rounding * norm(exact)
        assert error <= allowed, (
            f"{name} error {error:.2e} of values of size {norm(exact):.2e}; a plain run errs by {plain_error:.2e}, "
            f"so {allowed:.2e} is allowed"
        )


def _largest(values: Floats) -> float:
    return float(np.abs(values).max())


def _root_mean_square(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _float64(tensor: torch.Tensor) -> Floats:
    return np.asarray(tensor.detach().cpu().double().numpy(), dtype=np.float64)
