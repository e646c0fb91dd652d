"""Small models and inputs for the tests of the transformers integration."""

import functools

import torch
import transformers

from turnout.testing.tiny import TINY_GEMMA4, held_out_text

TEXT_FIELDS = dict(
    vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"], num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    global_head_dim=16, sliding_window=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
)  # fmt: skip
MOE_FIELDS = dict(enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=16)


def drawn_gemma4(dtype=torch.float32, implementation="grouped_mm"):
    """Two random layers: small enough to compile often."""
    config = transformers.Gemma4TextConfig(**TEXT_FIELDS, **MOE_FIELDS)
    model = transformers.Gemma4ForCausalLM._from_config(config, dtype=dtype, experts_implementation=implementation)
    return model.eval()


def drawn_conditional_generation():
    """The same as the text part of a multimodal model."""
    text_config = transformers.Gemma4TextConfig(**TEXT_FIELDS, **MOE_FIELDS)
    config = transformers.Gemma4Config(text_config=text_config, vision_config=None, audio_config=None)
    return transformers.Gemma4ForConditionalGeneration._from_config(config, dtype=torch.float32).eval()


def drawn_dense_gemma4():
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**TEXT_FIELDS))


def drawn_mixtral():
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def drawn_gpt_oss():
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


def drawn_phimoe():
    config = transformers.PhimoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.PhimoeForCausalLM(config)


def drawn_nemotron_h():
    """One layer, whose experts have no gate."""
    config = transformers.NemotronHConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, layers_block_type=["moe"], num_attention_heads=2,
        num_key_value_heads=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    )  # fmt: skip
    return transformers.NemotronHForCausalLM(config)


def routers_of(model):
    return [module for name, module in model.named_modules() if name.endswith("router")]


@functools.cache
def _held_out_ids():
    return transformers.AutoTokenizer.from_pretrained(TINY_GEMMA4)(held_out_text(), return_tensors="pt").input_ids


def text_ids(num_tokens):
    """[1, T] ids of text that the tiny model was not trained on."""
    return _held_out_ids()[:, :num_tokens]


def left_padded_prompts():
    """16 prompts of 9 to 24 tokens, padded on the left."""
    padding = torch.arange(24) < torch.arange(16)[:, None]
    prompts = _held_out_ids()[0, : 16 * 24].view(16, 24).masked_fill(padding, 0)
    return {"input_ids": prompts, "attention_mask": (~padding).long()}


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def router_states(report):
    """The states that the routers of a report are in."""
    return {row.router.state for row in report}


def experts_states(report):
    """The states that the experts of a report are in."""
    return {row.experts.state for row in report}
