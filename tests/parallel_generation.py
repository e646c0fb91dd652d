"""A model under each parallel plan of transformers, in as many processes, on the CPU: run by ``python FILE FOLDER``.

FOLDER holds a checkpoint. Each rank writes there what it saw of every plan, stock and applied, and a process that
holds the whole model writes the same. Ranks are forked, so that imports and kernels are loaded once for all.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from transformers.distributed import DistributedConfig

import turnout

RANKS = 4
PLANS = {
    "expert parallel, all_reduce": {"ep_size": RANKS, "ep_implementation": "auto"},
    "expert parallel, all_to_all": {"ep_size": RANKS, "ep_implementation": "all_to_all"},
    "tensor parallel": {},
}
PROMPTS = torch.stack([torch.arange(8, 24), torch.arange(28, 44)])
ROUTING, EXPERTS = "from logits to experts", "in experts"


def generated(model):
    return model.generate(PROMPTS, max_new_tokens=6, do_sample=False).tolist()


class Range:
    """A range of a profile that hooks of different modules begin and end."""

    def __init__(self, name):
        self.name = name

    def begin(self, *_):
        self.entered = record_function(self.name)
        self.entered.__enter__()

    def end(self, *_):
        self.entered.__exit__(None, None, None)


def mark(model):
    """Give a profile ranges from each router's logits to the call of its experts, and over that call."""
    for layer in model.model.layers:
        routing, experts = Range(ROUTING), Range(EXPERTS)
        layer.router.proj.register_forward_hook(routing.begin)
        layer.experts.register_forward_pre_hook(routing.end)
        layer.experts.register_forward_pre_hook(experts.begin)
        layer.experts.register_forward_hook(experts.end)


def ranges_around(event):
    while event is not None:
        if event.name in (ROUTING, EXPERTS):
            yield event.name
        event = event.cpu_parent


def seen(model):
    """The tokens, how often turnout's operators ran, and the copies inside of each range and of those operators."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        tokens = generated(model)
    events = trace.events()
    copies = [name for event in events if event.name == "aten::copy_" for name in ranges_around(event)]
    names = [event.name for event in events]
    return {
        "tokens": tokens,
        "calls": {name: names.count(f"turnout::{name}") for name in ("route", "experts")},
        "ranges": {name: names.count(name) for name in (ROUTING, EXPERTS)},
        "copies": {name: copies.count(name) for name in (ROUTING, EXPERTS)},
    }


def compared(model):
    """What is seen of a model as it is, and applied."""
    mark(model)
    stock = seen(model)
    report = turnout.apply(model)
    return {
        "stock": stock,
        "applied": seen(model),
        "contracts": sorted({row.router.contract_name for row in report}),
    }


def load(folder, config=None):
    model = transformers.Gemma4ForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, distributed_config=config
    )
    return model.eval()


def run_rank(rank, folder):
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    plans = {name: DistributedConfig(tp_size=RANKS, **plan) for name, plan in PLANS.items()}
    results = {name: compared(load(folder, config)) for name, config in plans.items()}
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def main(folder):
    model = load(folder)
    turnout.apply(model)
    generated(model)  # loads the kernels, before there are ranks that would each do so
    torch.multiprocessing.start_processes(run_rank, (folder,), RANKS, start_method="fork")
    (folder / "alone.json").write_text(json.dumps(compared(load(folder))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
