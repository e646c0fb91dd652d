"""What a layer's output should be, and how far from it a variant may lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from turnout.bench.layer_case import Case, LayerInputs
from turnout.testing.experts import ERROR_RATIO, ExpertsInputs, plain_run
from turnout.types import Routing

_POISON_COPIES = 8


class Expected(NamedTuple):
    """The right output of one call."""

    exact: torch.Tensor  # [T, H] float64
    plain_error: float  # of the same experts computed in the model's dtype, one operation after the other
    dtype: torch.dtype

    def error_of(self, out: torch.Tensor) -> float:
        """Norm of the difference to the exact output, over the norm of that."""
        return float((out.double() - self.exact).norm() / self.exact.norm())

    def check(self, name: str, out: torch.Tensor) -> float:
        """The error of a variant's output.

        Raises:
            RuntimeError: it is more than twice that of a plain run, or the output is of another form.
        """
        if out.shape != self.exact.shape or out.dtype != self.dtype:
            raise RuntimeError(
                f"{name} gives {list(out.shape)} of {out.dtype}, not {list(self.exact.shape)} of {self.dtype}"
            )
        error = self.error_of(out)
        if not error <= ERROR_RATIO * self.plain_error:  # NaN is no number below it
            raise RuntimeError(
                f"{name} is wrong, and not timed: its error is {error:.2e}, that of a plain run {self.plain_error:.2e}"
            )
        return error

    def poison_free_memory(self) -> None:
        """Overwrite what earlier outputs left in the allocator, so that an output not written shows."""
        buffers = [torch.full_like(self.exact, float("nan"), dtype=self.dtype) for _ in range(_POISON_COPIES)]
        del buffers


def expected_output(case: Case, i: int) -> Expected:
    """What the i-th call should give, from the reference's routing and its experts in float64."""
    given, routing = case.at(i), case.routing(i)
    expected = Expected(exact_output(given, routing, case.geometry.activation), 0.0, given.hidden_states.dtype)
    plain = plain_run(ExpertsInputs(given.hidden_states, given.weights, routing, case.geometry.experts_spec))
    return expected._replace(plain_error=expected.error_of(plain))


def exact_output(given: LayerInputs, routing: Routing, activation: str) -> torch.Tensor:
    """The experts one by one in float64, on the device of the weights: a CPU takes minutes at full size."""
    out = torch.zeros(given.hidden_states.shape, dtype=torch.float64, device=given.hidden_states.device)
    for expert in routing.topk_ids.unique().tolist():
        token, k = (routing.topk_ids == expert).nonzero(as_tuple=True)
        hidden = given.hidden_states[token].double()
        gate, up = (hidden @ given.weights.gate_up_proj[expert].double().T).chunk(2, dim=-1)
        values = (_activation(gate, activation) * up) @ given.weights.down_proj[expert].double().T
        out.index_add_(0, token, values * routing.topk_weights[token, k, None])
    return out


def _activation(gate: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return nn.functional.silu(gate)
    return nn.functional.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")
