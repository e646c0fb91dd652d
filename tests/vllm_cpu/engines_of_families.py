"""Small models of the Mixture-of-Experts families, made on the spot and run by vLLM; `test_plugin_models` reads it.

Run as a script with a folder, it writes one JSON file for each family: its MoE layers, and what turnout does in them.
Each engine runs in a process of its own, forked once vLLM is imported: that takes longer than the engine.
"""

import dataclasses
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Family:
    """A model by its config, with as many MoE layers as that says."""

    model_type: str
    architecture: str
    moe_layers: int
    fields: dict
    model_impl: str = "vllm"
    runner: str = "MoERunner"
    state: str = "routed"


COMMON = {
    "hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts_per_tok": 2, "vocab_size": 256,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Mixtral": Family("mixtral", "MixtralForCausalLM", 3, {"num_local_experts": 8}),
    "Gemma 4": Family(
        "gemma4_text", "Gemma4ForCausalLM", 3,
        {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "hidden_size_per_layer_input": 0,
         "global_head_dim": 64, "num_global_key_value_heads": 1},
    ),
    "Qwen2 MoE, shared experts": Family(
        "qwen2_moe", "Qwen2MoeForCausalLM", 3, {"num_experts": 8, "shared_expert_intermediate_size": 64}
    ),
    "Qwen3 MoE, one dense layer": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", 2, {"num_experts": 8, "norm_topk_prob": True, "mlp_only_layers": [1]}
    ),
    "GLM-4 MoE, DeepSeek-V3's router": Family(
        "glm4_moe", "Glm4MoeForCausalLM", 2,
        {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
    ),
    "gpt-oss": Family("gpt_oss", "GptOssForCausalLM", 3, {"num_local_experts": 8, "head_dim": 64}),
    "HunYuan, routed by transformers": Family(
        "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", 3, {"num_experts": 8, "moe_topk": 2},
        model_impl="transformers", runner="TransformersMoERunner", state="strict",
    ),
}  # fmt: skip


def run(name: str, folder: Path) -> None:
    """Write what the engine of a family does into its file, or why it does nothing."""
    try:
        outcome = outcome_of(FAMILIES[name], folder / f"{name} model")
    except Exception:
        outcome = {"error": traceback.format_exc()}
    (folder / f"{name}.json").write_text(json.dumps(outcome))


def outcome_of(family: Family, folder: Path) -> dict:
    """The runners that the model has and the states of those that turnout is bound to, after a forward pass."""
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.models.registry import ModelRegistry

    from turnout.integrations import vllm as plugin

    config = AutoConfig.for_model(family.model_type, **{**COMMON, **family.fields})
    config.architectures = [family.architecture]
    config.save_pretrained(folder)
    if family.model_impl == "vllm":  # by its name, vLLM would inspect it in yet another process
        model = ModelRegistry.models[family.architecture].load_model_cls()
        ModelRegistry.register_model(family.architecture, model)
    engine = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, model_impl=family.model_impl,
        dtype="bfloat16", max_model_len=128, max_num_seqs=2,
    )  # fmt: skip
    parameters = SamplingParams(max_tokens=3, detokenize=False, ignore_eos=True)
    answers = engine.generate({"prompt_token_ids": [5, 6, 7]}, parameters, use_tqdm=False)
    runners = lambda model: [type(module).__name__ for module in model.modules() if isinstance(module, MoERunner)]
    return {
        "tokens": len(answers[0].outputs[0].token_ids),
        "runners": engine.apply_model(runners)[0],
        "states": [row.state for row in plugin.explain()],
        "explained": str(plugin.explain()),
    }


def main(folder: Path) -> None:
    """Run all families, one after the other."""
    import transformers  # noqa: F401  imported once, for all
    import vllm.v1.engine.core
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for name in FAMILIES:
        process = multiprocessing.get_context("fork").Process(target=run, args=(name, folder))
        process.start()
        process.join()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main(Path(sys.argv[1]))
