"""Experts on a CPU: GEMMs through torch."""

from __future__ import annotations

import torch

from turnout.experts import reference
from turnout.spec import ExpertsSpec
from turnout.types import ExpertsWeights, Routing


def launch(
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    routing: Routing,
    spec: ExpertsSpec,
    out: torch.Tensor,
) -> None:
    """Run the experts of every token into ``out``."""
    reference.launch(hidden_states, weights, routing, spec, out)
