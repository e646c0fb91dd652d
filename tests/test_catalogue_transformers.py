"""The facts that the catalogue states as run about transformers, run again on the installed version."""

import collections

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import turnout

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 6, 32, 16, 8, 4
DTYPES = (torch.int16, torch.int32, torch.uint32, torch.int64)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def gemma4_experts(implementation):
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

    config = transformers.Gemma4TextConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        top_k_experts=TOP_K,
        enable_moe_block=True,
    )
    config._experts_implementation = implementation
    return drawn(Gemma4TextExperts(config))


def gpt_oss_experts(implementation):
    """Experts with biases."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = transformers.GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = implementation
    return drawn(GptOssExperts(config))


def drawn(experts):
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return experts


def routed():
    hidden = torch.randn(TOKENS, HIDDEN)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    return hidden, ids, torch.rand(TOKENS, TOP_K)


def id_casts(experts, hidden, ids, weights):
    """How often tensors of T*K ids are cast inside one call, index operations included."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        experts(hidden, ids, weights)
    shapes = collections.Counter(
        str(event.input_shapes[0]) for event in trace.events() if event.name == "aten::_to_copy"
    )
    return shapes[str([TOKENS * TOP_K])]


def accepted(name):
    entry = turnout.contracts.entry(name)
    return {entry.contract.ids_dtype, *entry.also_accepts}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_accepts_int64_alone(dtype):
    hidden, ids, weights = routed()
    experts = gemma4_experts("eager")
    if dtype in accepted("transformers.eager"):
        assert id_casts(experts, hidden, ids.to(dtype), weights) == 0
    else:
        with pytest.raises(RuntimeError, match="LongTensor"):
            experts(hidden, ids.to(dtype), weights)


def test_batched_mm_casts_int32_inside_each_index_and_int64_never():
    hidden, ids, weights = routed()
    experts = gemma4_experts("batched_mm")
    assert id_casts(experts, hidden, ids, weights) == 0
    assert id_casts(experts, hidden, ids.int(), weights) == 2
    assert id_casts(gpt_oss_experts("batched_mm"), hidden, ids.int(), weights) == 4
    assert accepted("transformers.batched_mm") == {torch.int64}


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint32], ids=str)
def test_batched_mm_cannot_index_with(dtype):
    hidden, ids, weights = routed()
    with pytest.raises((IndexError, NotImplementedError), match=r"must be long|not implemented for 'UInt32'"):
        gemma4_experts("batched_mm")(hidden, ids.to(dtype), weights)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_grouped_mm_on_a_cpu_pays_one_cast_whatever_the_dtype(dtype):
    hidden, ids, weights = routed()
    experts = gemma4_experts("grouped_mm")
    with torch.no_grad():
        assert torch.equal(experts(hidden, ids.to(dtype), weights), experts(hidden, ids, weights))
    assert id_casts(experts, hidden, ids.to(dtype), weights) == 1
    assert dtype in accepted("transformers.grouped_mm.cpu")


def test_grouped_mm_with_biases_is_cheapest_with_int64():
    hidden, ids, weights = routed()
    experts = gpt_oss_experts("grouped_mm")
    assert id_casts(experts, hidden, ids, weights) == 1
    assert id_casts(experts, hidden, ids.int(), weights) == 3


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_num_experts_with_weight_zero_is_skipped_under_expert_parallelism(implementation):
    hidden, ids, weights = routed()
    experts = gemma4_experts(implementation)
    if not hasattr(experts, "_is_expert_parallel"):
        pytest.skip(f"transformers {transformers.__version__} has no expert-parallel flag on its experts")
    elsewhere = torch.zeros_like(ids, dtype=torch.bool)
    elsewhere[:, 1] = True
    elsewhere[2] = True
    weights = weights.masked_fill(elsewhere, 0.0)
    with torch.no_grad():
        wanted = experts(hidden, ids, weights)
        experts._is_expert_parallel = True
        contract = turnout.contracts["transformers.expert_parallel.local"]
        assert contract.sentinel == "num_experts"
        local = ids.masked_fill(elsewhere, EXPERTS).to(contract.ids_dtype)
        torch.testing.assert_close(experts(hidden, local, weights), wanted)


def test_grouped_mm_is_wrong_with_minus_one():
    hidden, ids, weights = routed()
    experts = gemma4_experts("grouped_mm")
    weights[:, 1] = 0.0
    minus_one = ids.clone()
    minus_one[:, 1] = -1
    with torch.no_grad():
        wanted = experts(hidden, ids, weights)
        got = experts(hidden, minus_one, weights)
    assert not torch.allclose(got, wanted, atol=1e-3)
