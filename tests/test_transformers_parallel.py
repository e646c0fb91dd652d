"""An applied model in four processes, under the parallel plans of transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from gemma4_models import MOE_FIELDS, TEXT_FIELDS

PLANS = ("expert parallel, all_reduce", "expert parallel, all_to_all", "tensor parallel")
RANKS, LAYERS, FORWARDS = 4, 2, 6
ROUTING, EXPERTS = "from logits to experts", "in experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each process has written what it saw."""
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface  # noqa: F401
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has other parallel plans")
    folder = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    heads = dict(num_attention_heads=RANKS, num_key_value_heads=RANKS, num_global_key_value_heads=RANKS)
    config = transformers.Gemma4TextConfig(**TEXT_FIELDS | heads, **MOE_FIELDS)
    model = transformers.Gemma4ForCausalLM._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # so that tokens follow from more than the embedding
    model.save_pretrained(folder / "model")
    worker = Path(__file__).with_name("parallel_generation.py")
    done = subprocess.run([sys.executable, worker, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """What a process that holds the whole model saw."""
    return json.loads((folder / "alone.json").read_text())


@pytest.fixture(scope="module")
def ranks(folder):
    """What each rank saw, by plan."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("plan", PLANS)
def test_tokens_of_every_rank_equal_those_of_one_process(alone, ranks, plan):
    tokens = alone["stock"]["tokens"]
    assert len({tuple(row) for row in tokens}) == len(tokens)
    for rank in ranks:
        assert rank[plan]["stock"]["tokens"] == tokens
        assert rank[plan]["applied"]["tokens"] == tokens


@pytest.mark.parametrize("plan", PLANS)
def test_both_stations_run_on_every_rank(ranks, plan):
    """Local ids with sentinels reach the experts, or rows already sorted out, or a part of each expert."""
    for rank in ranks:
        assert rank[plan]["applied"]["calls"] == {"route": LAYERS * FORWARDS, "experts": LAYERS * FORWARDS}
        assert rank[plan]["contracts"] == ["transformers.expert_parallel.all_to_all"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("variant", ["stock", "applied"])
def test_a_rank_copies_as_often_between_logits_and_experts_as_one_process(alone, ranks, plan, variant):
    """Inside of operators, too. The norm of what the experts read lies there, so that the number is not 0."""
    want = alone[variant]["copies"][ROUTING]
    assert want > 0
    for rank in ranks:
        assert rank[plan][variant]["ranges"][ROUTING] == LAYERS * FORWARDS
        assert rank[plan][variant]["copies"][ROUTING] == want


def test_a_tensor_parallel_rank_copies_as_often_in_its_experts_as_one_process(alone, ranks):
    """Expert parallel ones also copy what they exchange."""
    assert alone["stock"]["copies"][EXPERTS] > 0
    assert alone["applied"]["copies"][EXPERTS] == 0
    for rank in ranks:
        for variant in ("stock", "applied"):
            assert rank["tensor parallel"][variant]["copies"][EXPERTS] == alone[variant]["copies"][EXPERTS]
