"""turnout: Mixture-of-Experts routing that writes every intermediate in the form its consumer reads."""

import importlib
from typing import TYPE_CHECKING, Any

from turnout._version import __version__
from turnout.combine.api import combine
from turnout.contracts import CatalogueEntry, Contract, contracts
from turnout.experts.api import experts
from turnout.integrations.compressed_tensors import load_quantized
from turnout.integrations.transformers import apply, explain, restore
from turnout.moe import moe
from turnout.permutation.api import permute
from turnout.routing.api import route
from turnout.spec import ExpertsSpec, RouterSpec
from turnout.types import ExpertsWeights, Permutation, RouterWeights, Routing, RoutingInputs

if TYPE_CHECKING:
    from turnout.audit.api import audit

__all__ = [
    "CatalogueEntry",
    "Contract",
    "ExpertsSpec",
    "ExpertsWeights",
    "Permutation",
    "RouterSpec",
    "RouterWeights",
    "Routing",
    "RoutingInputs",
    "__version__",
    "apply",
    "audit",
    "combine",
    "contracts",
    "experts",
    "explain",
    "load_quantized",
    "moe",
    "permute",
    "restore",
    "route",
]


def __getattr__(name: str) -> Any:
    """``turnout.audit``, imported at its first use: a room above this one, and a module that can be called."""
    if name == "audit":
        return importlib.import_module("turnout.audit")
    raise AttributeError(f"module 'turnout' has no attribute {name!r}")
