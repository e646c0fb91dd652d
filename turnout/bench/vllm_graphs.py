"""CUDA graphs of vLLM, one set for each variant over the same weights, so that variants can take turns in one engine.

vLLM keeps what it captured in dictionaries: one in each wrapper of a piece of the model (or of the whole), and one
in the graph manager of its second model runner. A set is what they hold after a capture; to change variants is to
put another set in. Nothing is captured twice, and sets share weights, inputs and the memory pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class CapturedGraphs(NamedTuple):
    """The graphs of one variant."""

    stores: list[tuple[dict[Any, Any], dict[Any, Any]]]  # a dictionary of vLLM's, and what it held

    @property
    def number(self) -> int:
        """How many there are."""
        return sum(len(held) for _, held in self.stores)


def capture_graphs(model_runner: Any) -> CapturedGraphs:
    """Capture the model as it runs now, with an empty store.

    Raises:
        RuntimeError: vLLM captured nothing.
    """
    before = [(store, dict(store)) for store in _stores(model_runner)]  # keep their memory pool alive
    for store, _ in before:
        store.clear()
    model_runner.capture_model()
    captured = CapturedGraphs([(store, dict(store)) for store in _stores(model_runner)])
    if captured.number == 0:
        raise RuntimeError("vLLM captured no CUDA graph, so that variants cannot be compared with graphs; pass --eager")
    return captured


def replay_graphs(captured: CapturedGraphs) -> None:
    """Let vLLM replay these from now on."""
    for store, held in captured.stores:
        store.clear()
        store.update(held)


def _stores(model_runner: Any) -> Iterator[dict[Any, Any]]:
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    for wrapper in list(CUDAGraphWrapper._all_instances):
        yield wrapper.concrete_cudagraph_entries
    manager = getattr(model_runner, "cudagraph_manager", None)
    if manager is not None:
        yield manager.graphs
