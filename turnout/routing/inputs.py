"""The tensors of one call besides the logits, as the operators hand them to an implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RoutingTensors(NamedTuple):
    """Those fields of `turnout.RoutingInputs` that routing reads or writes, in the order of the operators' arguments.

    ``given_ids`` is ``RoutingInputs.tid2eid``, a row for each token id, or ``forced_ids``, a row for each token.
    """

    per_expert_scale: torch.Tensor | None = None
    is_padding: torch.Tensor | None = None
    num_valid_tokens: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None
    e_score_correction_bias: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    given_ids: torch.Tensor | None = None
    logical_to_physical_map: torch.Tensor | None = None
    logical_replica_count: torch.Tensor | None = None
    # Only of the operator that writes into buffers:
    record_load: torch.Tensor | None = None
    num_counted_tokens: torch.Tensor | None = None
    expert_load: torch.Tensor | None = None  # added to
    replay_ids: torch.Tensor | None = None  # written

    def are_plain(self) -> bool:
        """Whether those from the fifth on, which most routers lack, are None; asked at every call, so in one step."""
        return _NONE.issuperset(self[4:])


_NONE = frozenset((None,))
