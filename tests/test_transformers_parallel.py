"""An applied model in two processes, under the parallel plans of transformers."""

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
LAYERS, FORWARDS = 2, 6


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface  # noqa: F401
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has other parallel plans")
    folder = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_global_key_value_heads=2)
    config = transformers.Gemma4TextConfig(**TEXT_FIELDS | heads, **MOE_FIELDS)
    model = transformers.Gemma4ForCausalLM._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # so that tokens follow from more than the embedding
    model.save_pretrained(folder / "model")
    worker = Path(__file__).with_name("parallel_generation.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    done = subprocess.run([*launch, folder / "model", folder / "result.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = model.eval().generate(
        torch.stack([torch.arange(8, 24), torch.arange(28, 44)]), max_new_tokens=FORWARDS, do_sample=False
    )
    return alone.tolist(), json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("plan", PLANS)
def test_tokens_equal_those_of_one_process(results, plan):
    alone, by_plan = results
    assert by_plan[plan]["stock"] == alone
    assert by_plan[plan]["applied"] == alone


@pytest.mark.parametrize("plan", PLANS)
def test_both_stations_run_on_every_rank(results, plan):
    """Local ids with sentinels reach the experts, or rows already sorted out, or a part of each expert."""
    result = results[1][plan]
    assert result["calls"] == {"route": LAYERS * FORWARDS, "experts": LAYERS * FORWARDS}
    assert result["contracts"] == ["transformers.expert_parallel.all_to_all"]
