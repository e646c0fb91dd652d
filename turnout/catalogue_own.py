"""What turnout's own experts read: `turnout.moe` lets the routing launch write it."""

from __future__ import annotations

import torch

from turnout._version import __version__
from turnout.contracts import PADDED_BLOCK_MAP, CatalogueEntry, Contract

IDS_AND_WEIGHTS = Contract(sentinel=-1)
BLOCKS = Contract(sentinel=-1, structures=PADDED_BLOCK_MAP)


def _own(impl: str, contract: Contract, reads: str) -> CatalogueEntry:
    return CatalogueEntry(
        name=f"turnout.experts.{impl}",
        contract=contract,
        reads=reads,
        repository="turnout/turnout",
        path=f"turnout/experts/{impl}.py",
        commit=f"v{__version__}",
        versions=f"=={__version__}",
        evidence="run",
        also_accepts=(),
    )


OWN_ENTRIES = (
    _own("reference", IDS_AND_WEIGHTS, "Finds the slots of each expert in the ids."),
    _own("cpu", IDS_AND_WEIGHTS, "Counts and orders the ids itself."),
    _own("triton", IDS_AND_WEIGHTS, "Reads the id and the weight of each slot, and no structure."),
    _own("grouped", BLOCKS, "Takes the slots in blocks of one expert each; how large they are, its tuning says."),
    CatalogueEntry(
        name="turnout.transformers",
        contract=Contract(),
        reads="Ids and weights alone, in any dtype: all that transformers hands to experts. What an implementation "
        "needs besides, turnout computes from the ids.",
        repository="turnout/turnout",
        path="turnout/integrations/_transformers_experts.py",
        commit=f"v{__version__}",
        versions=f"=={__version__}",
        evidence="run",
        also_accepts=(torch.int16, torch.uint32, torch.int64),
        note="Any id outside of the experts marks a slot that is skipped: -1, or num_experts under expert parallelism.",
    ),
)
