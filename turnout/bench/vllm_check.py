"""Whether vLLM gives the same answers with turnout as without."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from turnout.bench.balance import balance_of
from turnout.bench.vllm_consumer import CONSUMER
from turnout.bench.vllm_engine import CHECKED_TOKENS, VllmEngine

WEIGHTS_TOLERANCE = 1e-5  # above it weights are wrong; how near they are is stated
PROMPTS_ALONE = 4


@dataclasses.dataclass
class Replay:
    """The router logits of a stock run, routed again by turnout, all layers and forwards together.

    Attributes:
        rows: tokens times layers.
        boundary_ties: rows whose logits tie at the last place: stock and turnout may choose differently there.
        sets_differ: rows with other experts.
        sets_differ_without_tie: those of them without such a tie.
        most_weight_difference: on rows with the same experts.
        first_tie: number of the first forward with a boundary tie; None: there was none.
    """

    rows: int = 0
    boundary_ties: int = 0
    sets_differ: int = 0
    sets_differ_without_tie: int = 0
    most_weight_difference: float = 0.0
    first_tie: int | None = None

    def add(self, forward: int, router_logits: torch.Tensor, stock: Routed, turnout: Routed) -> None:
        """Count the rows of one call."""
        ranked = router_logits.float().sort(dim=-1, descending=True).values
        top_k = stock[1].shape[1]
        ties = ranked[:, top_k - 1] == ranked[:, min(top_k, ranked.shape[1] - 1)]
        (stock_ids, stock_weights), (ids, weights) = (_by_expert(*each) for each in (stock, turnout))
        differ = (stock_ids != ids).any(dim=-1)
        apart = (stock_weights - weights).abs().amax(dim=-1).masked_fill(differ, 0)
        self.rows += len(ties)
        self.boundary_ties += int(ties.sum())
        self.sets_differ += int(differ.sum())
        self.sets_differ_without_tie += int((differ & ~ties).sum())
        self.most_weight_difference = max(self.most_weight_difference, float(apart.amax()))
        if self.first_tie is None and bool(ties.any()):
            self.first_tie = forward

    def check(self) -> None:
        """Raise a RuntimeError where turnout does not choose what stock chooses."""
        if self.sets_differ_without_tie:
            raise RuntimeError(f"turnout chose other experts than vLLM where no logits tie: {self}")
        if self.most_weight_difference > WEIGHTS_TOLERANCE:
            raise RuntimeError(f"turnout's weights are not vLLM's: {self}")


Routed = tuple[torch.Tensor, torch.Tensor]  # topk_weights, topk_ids


def _by_expert(topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> Routed:
    """Ids in ascending order, and their weights."""
    ids, order = topk_ids.long().sort(dim=-1)
    return ids, topk_weights.float().gather(1, order)


class Watch:
    """What the routers of a stock run gave, layer by layer, and what turnout gives on the same logits.

    Attributes:
        replay: the comparison.
        tokens_per_expert: by layer, [E] int64 on the CPU.
    """

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self._first = next(iter(engine.layers))
        self._forward = -1
        self.replay = Replay()
        self.tokens_per_expert: dict[str, torch.Tensor] = {}

    def saw(self, layer: str, router_logits: torch.Tensor, stock: Routed, turnout: Routed) -> None:
        """Take in one call of a router."""
        self._forward += layer == self._first
        self.replay.add(self._forward, router_logits, stock, turnout)
        counts = stock[1].long().flatten().bincount(minlength=router_logits.shape[1]).cpu()
        self.tokens_per_expert[layer] = self.tokens_per_expert.get(layer, 0) + counts


@contextlib.contextmanager
def watch(engine: VllmEngine) -> Iterator[Watch]:
    """Run stock, and let turnout route the same logits beside it; what a CUDA graph replays is not seen."""
    from turnout.integrations import vllm as plugin

    engine.use("stock")
    seen = Watch(engine)

    def beside(name: str, select_experts: Any) -> Any:
        def select_and_compare(**inputs: Any) -> Routed:
            stock: Routed = select_experts(**inputs)
            plugin.use("routing")
            turnout = select_experts(**inputs)
            plugin.use("off")
            seen.saw(name, inputs["router_logits"], stock, turnout)
            return stock

        return select_and_compare

    for name, layer in engine.layers.items():
        layer.router.select_experts = beside(name, layer.router.select_experts)
    try:
        yield seen
    finally:
        for layer in engine.layers.values():
            del layer.router.select_experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Greedy tokens of one variant beside stock's.

    Attributes:
        requests: prompts, each with `CHECKED_TOKENS` tokens.
        identical: requests with the same tokens.
        explained: of the requests run alone, those that are the same up to the first forward with a boundary tie.
            None: CUDA graphs hide the ties of decode.
        alone: how many ran alone.
    """

    requests: int
    identical: int
    explained: int | None
    alone: int


def check_answers(engine: VllmEngine) -> dict[str, Any]:
    """Compare variants before they are timed.

    Returns:
        Findings, JSON values: ``balance``, ``replay``, ``tokens``, ``graphs``, and ``declared`` where that is compared.

    Raises:
        RuntimeError: turnout routes otherwise than vLLM, or a declared consumer changes an answer.
    """
    with watch(engine) as seen:
        stock = _tokens(engine.generate(engine.prompts, CHECKED_TOKENS))
    seen.replay.check()
    tokens = {}
    for variant in list(engine.modes)[1:]:
        engine.use(variant)
        ours = _tokens(engine.generate(engine.prompts, CHECKED_TOKENS))
        explained = [_is_explained(engine, variant, prompt) for prompt in engine.prompts[:PROMPTS_ALONE].split(1)]
        tokens[variant] = dataclasses.asdict(
            Tokens(
                requests=len(stock),
                identical=sum(a == b for a, b in zip(stock, ours, strict=True)),
                explained=sum(explained) if engine.is_eager else None,
                alone=len(explained),
            )
        )
    replay = dataclasses.asdict(seen.replay)
    del replay["first_tie"]  # says something of a single request only
    balance = dataclasses.asdict(balance_of(seen.tokens_per_expert.values()))
    findings: dict[str, Any] = {"balance": balance, "replay": replay, "tokens": tokens, "graphs": engine.graph_counts}
    declared = [variant for variant, mode in engine.modes.items() if mode.is_declared]
    if declared:
        findings["declared"] = _check_declared(engine, "turnout int32", *declared)
    return findings


def _check_declared(engine: VllmEngine, before: str, after: str) -> dict[str, Any]:
    """Whether two variants that differ in the dtype of the ids alone give the same bits.

    Raises:
        RuntimeError: they do not.
    """
    answers = []
    for variant in (before, after):
        engine.use(variant)
        outputs = engine.generate(engine.prompts, CHECKED_TOKENS, logprobs=True)
        answers.append([(tokens, output.outputs[0].cumulative_logprob) for tokens, output in _with_tokens(outputs)])
    if answers[0] != answers[1]:
        raise RuntimeError(f"{after} gives other tokens or log-probabilities than {before}: {answers}")
    return {
        "consumer": CONSUMER,
        "variants": [before, after],
        "requests": len(answers[0]),
        "same_tokens_and_logprob_sums": True,
    }


def _is_explained(engine: VllmEngine, variant: str, prompt: torch.Tensor) -> bool:
    with watch(engine) as seen:
        (stock,) = _tokens(engine.generate(prompt, CHECKED_TOKENS))
    engine.use(variant)
    (ours,) = _tokens(engine.generate(prompt, CHECKED_TOKENS))
    first_tie = CHECKED_TOKENS if seen.replay.first_tie is None else seen.replay.first_tie
    return stock[:first_tie] == ours[:first_tie]


def _with_tokens(outputs: Sequence[Any]) -> list[tuple[list[int], Any]]:
    return [(list(output.outputs[0].token_ids), output) for output in outputs]


def _tokens(outputs: Sequence[Any]) -> list[list[int]]:
    return [tokens for tokens, _ in _with_tokens(outputs)]
