"""Whether the Mixture-of-Experts layers of an applied model compute what those of the stock model do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

MOST_LAYERS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCheck:
    """One layer on the inputs of a decode step, in the stock model and in the applied one.

    Attributes:
        layer: its number.
        distinct_experts: chosen by at least one token.
        ids_differ: tokens for which the two choose other experts.
        ids_differ_without_tie: those of them whose logits do not tie at the last place.
        stock_error, turnout_error: root mean square of the error of the experts' output, each against float32 on its
            own routing, relative to that output.
    """

    layer: int
    distinct_experts: int
    ids_differ: int
    ids_differ_without_tie: int
    stock_error: float
    turnout_error: float


def check_layers(stock: Any, turnout: Any, step: Callable[[], object]) -> list[LayerCheck]:
    """Compare the first, the middle and the last layer of two models that share their parameters.

    Args:
        stock: a Gemma 4 as transformers runs it.
        turnout: the same with turnout applied.
        step: runs ``stock`` once; the inputs of its layers are recorded there.
    """
    layers = stock.model.layers
    numbers = sorted({0, len(layers) // 2, len(layers) - 1})[:MOST_LAYERS]
    inputs: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for number in numbers:
        for name in ("router", "experts"):

            def keep(module: object, args: tuple[Any, ...], key: tuple[int, str] = (number, name)) -> None:
                inputs[key] = args[0]

            handles.append(getattr(layers[number], name).register_forward_pre_hook(keep))
    step()
    for handle in handles:
        handle.remove()
    return [
        _check(
            number, (layers[number], turnout.model.layers[number]), inputs[number, "router"], inputs[number, "experts"]
        )
        for number in numbers
    ]


def _check(
    number: int, layers: tuple[Any, Any], routed_states: torch.Tensor, hidden_states: torch.Tensor
) -> LayerCheck:
    routings, errors = [], []
    for layer in layers:
        _, topk_weights, topk_ids = layer.router(routed_states)
        output = layer.experts(hidden_states, topk_ids, topk_weights)
        exact = _exact(layer.experts, hidden_states, topk_ids, topk_weights)
        routings.append(topk_ids.long().sort(dim=-1).values)
        errors.append(relative_difference(output, exact))
    router = layers[0].router
    logits = router.proj(router.norm(routed_states) * router.scale * router.scalar_root_size)
    ranked = logits.sort(dim=-1, descending=True).values
    top_k = routings[0].shape[1]
    is_tied = ranked[:, top_k - 1] == ranked[:, top_k]
    differs = (routings[0] != routings[1]).any(dim=-1)
    return LayerCheck(
        layer=number,
        distinct_experts=routings[0].unique().numel(),
        ids_differ=int(differs.sum()),
        ids_differ_without_tie=int((differs & ~is_tied).sum()),
        stock_error=errors[0],
        turnout_error=errors[1],
    )


def _exact(
    experts: Any, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """The experts in float32 throughout, slot by slot."""
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for token, chosen in enumerate(topk_ids.tolist()):
        states = hidden_states[token].float()
        for k, expert in enumerate(chosen):
            gate, up = (experts.gate_up_proj[expert].float() @ states).chunk(2)
            output[token] += topk_weights[token, k] * (experts.down_proj[expert].float() @ (experts.act_fn(gate) * up))
    return output


def relative_difference(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference, relative to the reference's."""
    reference = reference.double()
    return float((values.double() - reference).norm() / reference.norm())
