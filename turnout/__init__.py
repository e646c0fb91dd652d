"""turnout: Mixture-of-Experts routing that writes every intermediate in the form its consumer reads."""

from turnout._version import __version__
from turnout.contracts import CatalogueEntry, Contract, contracts
from turnout.integrations.transformers import apply, explain, restore
from turnout.routing.api import route
from turnout.spec import RouterSpec
from turnout.types import Routing, RoutingInputs

__all__ = [
    "CatalogueEntry",
    "Contract",
    "RouterSpec",
    "Routing",
    "RoutingInputs",
    "__version__",
    "apply",
    "contracts",
    "explain",
    "restore",
    "route",
]
