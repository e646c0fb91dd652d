"""Run by ``torch.distributed.run``: an applied model under each parallel plan of transformers, on the CPU.

Arguments: folder of a checkpoint, file for the result. For each plan rank 0 writes the tokens without and with
turnout, and how often its operators ran.
"""

import json
import os
import sys

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers.distributed import DistributedConfig

from turnout.integrations.transformers import apply

PLANS = {
    "expert parallel, all_reduce": {"ep_size": 2, "ep_implementation": "auto"},
    "expert parallel, all_to_all": {"ep_size": 2, "ep_implementation": "all_to_all"},
    "tensor parallel": {},
}
PROMPTS = torch.stack([torch.arange(8, 24), torch.arange(28, 44)])


def generated(model):
    return model.generate(PROMPTS, max_new_tokens=6, do_sample=False)


def run(checkpoint, plan):
    config = DistributedConfig(tp_size=2, **plan)
    load = transformers.Gemma4ForCausalLM.from_pretrained
    model = load(checkpoint, dtype=torch.float32, distributed_config=config).eval()
    stock = generated(model)
    report = apply(model)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        applied = generated(model)
    names = [event.name for event in trace.events()]
    return {
        "stock": stock.tolist(),
        "applied": applied.tolist(),
        "calls": {name: names.count(f"turnout::{name}") for name in ("route", "experts")},
        "contracts": sorted({row.router.contract_name for row in report}),
    }


if __name__ == "__main__":
    checkpoint, file = sys.argv[1:]
    results = {name: run(checkpoint, plan) for name, plan in PLANS.items()}
    if os.environ["RANK"] == "0":
        with open(file, "w") as stream:
            json.dump(results, stream)
    torch.distributed.destroy_process_group()
