"""No silent stepping aside: in models of many families, turnout routes as many layers as have experts.

Where transformers routes, and hands vLLM's experts the result, there are no logits; turnout hands it on as it is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENGINE
from engines_of_families import FAMILIES


@pytest.fixture(scope="module")
def outcomes(vllm_ops, tmp_path_factory):
    """Of each family, from a process that has imported neither numba nor a model."""
    folder = tmp_path_factory.mktemp("families")
    script = Path(__file__).with_name("engines_of_families.py")
    environment = {**os.environ, **ENGINE, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, script, folder], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    files = {name: folder / f"{name}.json" for name in FAMILIES}
    crashed = json.dumps({"error": run.stderr})
    return {name: json.loads(file.read_text() if file.exists() else crashed) for name, file in files.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_turnout_is_in_every_moe_layer(name, outcomes):
    outcome, family = outcomes[name], FAMILIES[name]
    assert "error" not in outcome, outcome["error"]
    assert outcome["tokens"] == 3
    assert outcome["runners"] == [family.runner] * family.moe_layers
    assert outcome["states"] == [family.state] * family.moe_layers, outcome["explained"]
    assert len(outcome["explained"].splitlines()) == 2  # like layers are folded
