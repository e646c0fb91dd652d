"""Gemma 4 in transformers as an engine of ``turnout bench scenarios``: the models and runners of ``turnout demo``."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch

from turnout.bench.balance import balance_of
from turnout.bench.demo import Demo, open_demo
from turnout.bench.demo_result import Settings as DemoSettings
from turnout.bench.scenario_models import Checkpoint
from turnout.bench.scenario_result import Settings
from turnout.bench.scenarios import Runner, Scenario
from turnout.bench.transformers_engine import Variant
from turnout.bench.whole_model import check_agreement, decode_step
from turnout.bench.whole_model_check import check_layers
from turnout.integrations.transformers import explain
from turnout.testing.expert_load import tokens_per_expert


class TransformersEngine:
    """Stock and turnout over the same parameters; see `turnout.bench.scenario_bench.Engine`.

    Attributes:
        device: where the model is.
        variants: by name.
    """

    def __init__(self, demo: Demo) -> None:
        self.device = demo.device
        self.variants = {"stock": Variant(demo.stock), "turnout": Variant(demo.turnout)}
        self._prompts = demo.prompts

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return int(self._stock.config.get_text_config().top_k_experts)

    @property
    def _stock(self) -> Any:
        return self.variants["stock"].model

    def model(self, variant: str) -> torch.nn.Module | None:
        """The model of the variant."""
        return cast("torch.nn.Module", self.variants[variant].model)

    def runner(self, variant: str, scenario: Scenario) -> Runner:
        """The runner of a variant in a scenario."""
        return self.variants[variant].runner(scenario, self._prompts[: scenario.requests])

    @torch.no_grad()
    def check(self) -> dict[str, Any]:
        """Layers of both on the inputs of a decode step, and the balance over the experts in a prefill."""
        requests, tokens = self._prompts.shape
        scenario = Scenario(phase="decode", requests=requests, prompt_tokens=tokens, forwards=1)
        step = decode_step(self.variants["stock"], scenario, self._prompts)
        checks = check_layers(self._stock, self.variants["turnout"].model, step)
        check_agreement(checks)
        with tokens_per_expert(self._stock) as load:
            self._stock(input_ids=self._prompts, use_cache=False, logits_to_keep=1)
        return {
            "balance": dataclasses.asdict(balance_of(load)),
            "layer_checks": [dataclasses.asdict(check) for check in checks],
        }

    def plan(self) -> list[str]:
        """What turnout does in each layer."""
        return [str(row) for row in explain(self.variants["turnout"].model)]


def open_transformers(settings: Settings, checkpoint: Checkpoint, device: torch.device) -> TransformersEngine:
    """Load a Gemma 4 twice over the same parameters.

    Raises:
        ValueError: no weights, another kind of model, or prompts too long.
    """
    if not checkpoint.has_weights:
        raise ValueError(f"transformers needs weights, and {settings.model} has none; see `turnout bench transformers`")
    demo = open_demo(
        DemoSettings(
            model=str(checkpoint.folder),
            device=str(device),
            prefill=settings.prefill,
            decode=settings.decode,
            threads=torch.get_num_threads(),
        ),
        requests=max(settings.requests),
    )
    return TransformersEngine(demo)
