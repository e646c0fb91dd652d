"""Layers of quantised experts, what they should give in float64, and what a plain run in the model's dtype gives.

Nothing here calls turnout's own arithmetic: numbers are taken from the bits, and rounded as the library rounds.
"""

from typing import NamedTuple

import torch

import turnout
from turnout.experts.quantization import quantize_weights

SCHEMES = [("w4a16", 32), ("w4a16", 128), ("w4a8_int8", 32), ("w8a8_int8", None), ("w8a8_fp8", None)]
SCHEME_IDS = ["w4a16-32", "w4a16-128", "w4a8_int8", "w8a8_int8", "w8a8_fp8"]
NUM_TOKENS = (0, 1, 2, 15, 16, 17, 64, 257, 1024)
ROUTINGS = ("uniform", "skewed", "one_hot", "empty_experts")
# Steps from one number to the next, and the numbers' range; of float8 the largest number.
ACTIVATIONS = {"w4a16": None, "w4a8_int8": "int8", "w8a8_int8": "int8", "w8a8_fp8": "float8"}


class Sizes(NamedTuple):
    num_experts: int = 7
    top_k: int = 3
    hidden_size: int = 160  # of whole groups of 32, and no multiple of any tile
    intermediate_size: int = 96


class Case(NamedTuple):
    hidden_states: torch.Tensor
    weights: turnout.ExpertsWeights
    routing: turnout.Routing
    spec: turnout.ExpertsSpec


def draw(scheme, num_tokens, sizes=None, routing="uniform", dtype=torch.bfloat16, device="cpu", ids_dtype=torch.int64):
    """A layer and its inputs; sizes fit the scheme's groups."""
    quantization, group_size = scheme
    if sizes is None:
        sizes = Sizes(hidden_size=128, intermediate_size=128) if group_size == 128 else Sizes()
    rng = torch.Generator().manual_seed(1000 * num_tokens + sizes.num_experts)
    spec = turnout.ExpertsSpec(activation="gelu_tanh", quantization=quantization, group_size=group_size)
    experts, inner, hidden = sizes.num_experts, sizes.intermediate_size, sizes.hidden_size
    plain = turnout.ExpertsWeights(
        (torch.randn(experts, 2 * inner, hidden, generator=rng) / hidden**0.5).to(dtype),
        (torch.randn(experts, hidden, inner, generator=rng) / inner**0.5).to(dtype),
    )
    weights = quantize_weights(plain, spec)
    hidden_states = torch.randn(num_tokens, hidden, generator=rng).to(dtype)
    ids, topk_weights = choose(routing, num_tokens, sizes, rng)
    return Case(
        hidden_states.to(device),
        turnout.ExpertsWeights(*(tensor if tensor is None else tensor.to(device) for tensor in weights)),
        turnout.Routing(topk_weights.to(device), ids.to(ids_dtype).to(device)),
        spec,
    )


def choose(routing, num_tokens, sizes, rng):
    """K distinct experts for each token, and their weights."""
    scores = torch.randn(num_tokens, sizes.num_experts, generator=rng)
    if routing == "skewed":
        scores -= 2 * torch.arange(sizes.num_experts).float().log1p()
    elif routing == "one_hot":
        scores[:, 1] += 100
    elif routing == "empty_experts" and sizes.top_k < sizes.num_experts:
        scores[:, : (sizes.num_experts - sizes.top_k) // 2] -= 100
    ids = scores.argsort(dim=1, descending=True, stable=True)[:, : sizes.top_k]
    return ids.contiguous(), torch.rand(num_tokens, sizes.top_k, generator=rng)


def numbers_of(weight, scale):
    """The values of a quantised weight [E, rows, columns] in float64, from its bits."""
    if weight.dtype == torch.int32:
        nibbles = [((weight.long() >> (4 * j)) & 15) - 8 for j in range(8)]
        weight = torch.stack(nibbles, dim=-1).flatten(-2)
    per_column = scale.double().repeat_interleave(weight.shape[-1] // scale.shape[-1], dim=-1)
    return weight.double() * per_column


def quantized_rows(values, kind):
    """Rows as quantised by token, times their scales, in float64; scale and quotient are of the values' dtype."""
    if kind is None:
        return values.double()
    lowest, highest = (-128, 127) if kind == "int8" else (-448, 448)
    scale = values.abs().amax(dim=-1, keepdim=True) / ((highest - lowest) / 2)
    scale = torch.where(scale == 0, torch.finfo(values.dtype).eps, scale)
    numbers = (values / scale).clamp(lowest, highest)
    numbers = numbers.round() if kind == "int8" else numbers.to(torch.float8_e4m3fn)
    return numbers.double() * scale.double()


def expected(case, dtype=torch.float64):
    """The layer's output [T, H] with every operation in a dtype; in float64 the right one.

    Activations are quantised where and as the scheme says, from values of the model's dtype.
    """
    hidden_states, weights, routing, spec = case
    model_dtype, kind = hidden_states.dtype, ACTIVATIONS[spec.quantization]
    gate_up_proj = numbers_of(weights.gate_up_proj, weights.gate_up_scale).to(dtype)
    down_proj = numbers_of(weights.down_proj, weights.down_scale).to(dtype)
    ids = routing.topk_ids.long()
    out = torch.zeros(hidden_states.shape, dtype=dtype, device=hidden_states.device)
    for expert in range(len(down_proj)):
        token, k = (ids == expert).nonzero(as_tuple=True)
        hidden = quantized_rows(hidden_states[token], kind).to(dtype)
        gate, up = (hidden @ gate_up_proj[expert].T).chunk(2, dim=-1)
        values = torch.nn.functional.gelu(gate, approximate="tanh") * up
        values = values if kind is None else quantized_rows(values.to(model_dtype), kind)
        values = values.to(dtype) @ down_proj[expert].T
        out.index_add_(0, token, (values * routing.topk_weights[token, k, None]).to(dtype))
    return out


def check_errors(case, outputs):
    """At most twice the error of a plain run in the model's dtype, both against float64; outputs by implementation."""
    exact, plain = expected(case), expected(case, case.hidden_states.dtype)
    plain_error = (plain.double() - exact).norm()
    for name, out in outputs.items():
        assert out.shape == exact.shape
        assert out.dtype == case.hidden_states.dtype
        error = (out.double() - exact).norm()
        assert error <= 2 * plain_error, f"{name}, T={len(out)}: {error:.3e}, and {plain_error:.3e} of a plain run"
