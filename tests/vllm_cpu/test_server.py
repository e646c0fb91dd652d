"""The plugin in `vllm serve`, which answers over HTTP: many requests at once, failures, and a model without MoE."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import turnout
from turnout.bench import vllm_server

TINY = Path(turnout.__file__).parent / "assets" / "tiny_gemma4"
TEXT = (TINY / "held_out.txt").read_text()
AT_ONCE, MAX_TOKENS = 16, 32
PROMPTS = [TEXT[1000 * i : 1000 * i + 32 + 4 * i] for i in range(AT_ONCE)]
MESSAGE = "injected into the routing"

# A plugin of vLLM's own kind, loaded beside turnout's: from the moment that a file is there, routing fails.
FAULT = f"""
import os
from turnout.routing import cpu

def register():
    launch = cpu.launch

    def fail_when_told(*args):
        if os.path.exists(os.environ["FAIL_WHEN_THERE"]):
            raise ArithmeticError({MESSAGE!r})
        launch(*args)

    cpu.launch = fail_when_told
"""
FAULT_ENTRY = "[vllm.general_plugins]\nturnout_fault = turnout_fault:register\n"

DENSE = """
import json, sys
from vllm import LLM, SamplingParams
engine = LLM(sys.argv[1], enforce_eager=True, max_model_len=256, max_num_seqs=4, dtype="float32")
outputs = engine.generate(sys.argv[2:], SamplingParams(temperature=0, max_tokens=32, ignore_eos=True), use_tqdm=False)
compiled = "numba" in sys.modules
from turnout.integrations import _vllm_runner, vllm as plugin
print(json.dumps({
    "registered": _vllm_runner.is_registered(), "layers": len(plugin.explain()), "compiled": compiled,
    "tokens": [list(output.outputs[0].token_ids) for output in outputs],
}))
"""


@pytest.fixture(scope="module")
def failure(tmp_path_factory):
    """The file that makes routing fail in the server with the plugin."""
    return tmp_path_factory.mktemp("failure") / "now"


@pytest.fixture(scope="module")
def servers(vllm_ops, tmp_path_factory, failure):
    """With the plugin and without, started together. In float32 router logits do not tie, as they do in bfloat16."""
    folder = tmp_path_factory.mktemp("served")
    folders = (vllm_server.describe_vllm(folder / "metadata"), fault_plugin(folder / "fault"))
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                vllm_server.serve(
                    TINY, folder / f"{name}.log", "--dtype", "float32", folders=folders,
                    VLLM_PLUGINS=plugins, FAIL_WHEN_THERE=str(failure),
                )
            )
            for name, plugins in (("turnout", "turnout,turnout_fault"), ("stock", ""))
        }  # fmt: skip


def fault_plugin(folder):
    """A folder to import it from, in which vLLM finds it."""
    metadata = folder / "turnout_fault.dist-info"
    metadata.mkdir(parents=True)
    (folder / "turnout_fault.py").write_text(FAULT)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: turnout_fault\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(FAULT_ENTRY)
    return folder


@pytest.fixture(autouse=True)
def logs_of_servers(request):
    """Printed after a test, which pytest shows if it failed."""
    yield
    if "servers" in request.fixturenames:
        for name, server in request.getfixturevalue("servers").items():
            print(f"--- {name}\n{server.log.read_text()}")


@pytest.fixture(scope="module")
def streamed(servers):
    """What both servers answer to requests one by one, and all at once."""
    return {
        name: {at_once: ask(servers[name], PROMPTS, at_once, stream) for at_once in (1, AT_ONCE)}
        for name in ("turnout", "stock")
    }


def ask(server, prompts, at_once, request):
    """The answers to one request for each prompt, some of them under way at once; the first error is raised."""
    from openai import AsyncOpenAI

    async def ask_all():
        places = asyncio.Semaphore(at_once)
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:

            async def ask_one(number, prompt):
                async with places:
                    return await request(client, number, prompt)

            return await asyncio.gather(*(ask_one(*each) for each in enumerate(prompts)))

    server.wait()
    return asyncio.run(ask_all())


def complete(client, prompt, max_tokens, **further):
    extra = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    return client.completions.create(
        model=vllm_server.NAME, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=extra, **further
    )


async def stream(client, _, prompt):
    """Text, tokens, their log-probabilities, and why the stream has ended, if a chunk says so."""
    text, tokens, logprobs, reasons = "", [], [], []
    async for chunk in await complete(client, prompt, MAX_TOKENS, stream=True, logprobs=1):
        (choice,) = chunk.choices
        text += choice.text
        tokens += choice.logprobs.tokens
        logprobs += choice.logprobs.token_logprobs
        reasons.append(choice.finish_reason)
    return text, tokens, logprobs, reasons


@pytest.mark.parametrize("at_once", [1, AT_ONCE])
@pytest.mark.parametrize("name", ["turnout", "stock"])
def test_streams_are_complete(streamed, name, at_once):
    answers = streamed[name][at_once]
    assert len(answers) == AT_ONCE
    for text, tokens, _, reasons in answers:
        assert text
        assert len(tokens) == MAX_TOKENS
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
        assert len(reasons) > 1


@pytest.mark.parametrize("at_once", [1, AT_ONCE])
def test_answers_are_stock_vllms(streamed, at_once):
    """In float32: the best two tokens are never nearer than 1.4e-3 here, and rounding moves them by 5e-6."""
    for ours, stock in zip(streamed["turnout"][at_once], streamed["stock"][at_once], strict=True):
        assert ours[:2] == stock[:2]
        assert ours[2] == pytest.approx(stock[2], abs=1e-4)


def test_two_hundred_requests_lose_nothing(servers):
    prompts = [TEXT[100 * i : 100 * i + 20 + i % 37] for i in range(200)]
    max_tokens = lambda number: 2 + number % 11
    request = lambda client, number, prompt: complete(client, prompt, max_tokens(number))
    answers = ask(servers["turnout"], prompts, AT_ONCE, request)
    assert len({answer.id for answer in answers}) == 200
    for number, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        assert answer.usage.completion_tokens == max_tokens(number)
        assert answer.usage.prompt_tokens == 1 + len(prompt.encode())
        assert answer.choices[0].finish_reason == "length"


def said_by_turnout(log):
    """Lines of vLLM's log that are turnout's, without what vLLM puts before each."""
    return re.findall(r"\[\w+\.py:\d+\] ((?:turnout |  \d+ x ).*)", log)


def test_the_log_says_once_what_was_decided(servers, streamed):
    assert said_by_turnout(servers["turnout"].log.read_text()) == [
        "turnout routes 6 of 6 Mixture-of-Experts layers",
        "  6 x model.layers.*.experts: CPURouter -> vllm.cpu_unquantized int32, routed, impl cpu "
        "(no dispatcher declares: CPUUnquantizedExperts reads; logits on a CPU: one pass over each row)",
    ]
    assert not said_by_turnout(servers["stock"].log.read_text())


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory):
    """A small Llama with random weights and the bytes of the tiny Gemma 4 as tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("dense")
    config = LlamaConfig(
        vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


def test_a_model_without_experts_runs_untouched(vllm_ops, dense_model):
    environment = {**os.environ, **vllm_server.ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", DENSE, str(dense_model), *PROMPTS[:4]]

    def run(plugins):
        variables = environment | {"VLLM_PLUGINS": plugins}
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400, check=False)

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(run, ("turnout", "")))
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    ours, stock = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    assert ours["tokens"] == stock["tokens"]
    assert len({tuple(tokens) for tokens in ours["tokens"]}) == 4
    assert (ours["registered"], ours["layers"], ours["compiled"]) == (True, 0, False)
    assert not stock["registered"]
    assert not said_by_turnout(runs[0].stdout + runs[0].stderr)


# The last test of this file: it ends the server.
def test_zz_an_error_in_route_ends_requests_and_server_with_its_message(servers, failure):
    from openai import APIError

    async def read_and_injure(client, prompt):
        async for _ in await complete(client, prompt, MAX_TOKENS, stream=True):
            failure.touch()

    async def is_cut_off(client, _, prompt):
        with pytest.raises(APIError, match="EngineCore encountered an issue"):
            await read_and_injure(client, prompt)

    server = servers["turnout"]
    assert len(ask(server, PROMPTS, AT_ONCE, is_cut_off)) == AT_ONCE
    server.process.wait(timeout=120)
    assert f"ArithmeticError: {MESSAGE}" in server.log.read_text()
    assert not server.is_healthy()
