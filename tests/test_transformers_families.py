"""Whole models of other families: their routers stay, their experts run with turnout, and they answer as before."""

import importlib
import inspect

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers

from turnout.integrations.transformers import apply, restore

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "mamba_expand": 2, "mamba_d_state": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Each with something of its own: hash routing, groups, shared columns, biases and interleaving, dense layers between.
FAMILIES = [
    "afmoe", "aria", "beam", "deepseek_v2", "deepseek_v4", "ernie4_5_moe", "gpt_oss", "granitemoe", "hy_v4", "inkling",
    "jamba", "minimax_m2", "minimax_m3_vl", "mistral4", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
]  # fmt: skip


def drawn(family):
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if "@use_experts_implementation" not in inspect.getsource(module):
        pytest.skip(f"in transformers {transformers.__version__} {family} does not use the experts interface")
    kind = next(
        value for name, value in vars(module).items()
        if name.endswith("ForCausalLM") and inspect.isclass(value) and value.__module__ == module.__name__
    )  # fmt: skip
    default = kind.config_class()
    sizes = {name: size for name, size in SIZES.items() if type(getattr(default, name, None)) is type(size)}
    sizes |= (
        {"num_experts_per_tok": 2} if hasattr(default, "num_experts_per_tok") else {}
    )  # of some the default is None
    model = kind._from_config(kind.config_class(**sizes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.05)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_run_with_turnout_and_logits_stay(family):
    torch.manual_seed(0)
    model = drawn(family)
    ids = torch.randint(3, 96, (2, 12))

    def logits():
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    stock = logits()
    report = apply(model)
    assert {(row.router.state, row.experts.state) for row in report} == {("not supported", "replaced")}
    applied = logits()
    assert not torch.equal(applied, stock) or family == "inkling"  # the order of a float32 sum tells them apart
    torch.testing.assert_close(applied, stock, rtol=0, atol=2e-5 * stock.abs().max().item())
    restore(model)
    assert torch.equal(logits(), stock)
