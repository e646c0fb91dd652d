"""The catalogue: every entry is sourced, and the facts that decisions rest on are pinned by name."""

import dataclasses
import re

import pytest
import torch

import turnout
from turnout.catalogue import ENTRIES
from turnout.contracts import PADDED_BLOCK_MAP, STRUCTURES

NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
EACH_ENTRY = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)

# What PR #40565 said needs int64, and where that is read.
NAMED_IN_PR_40565 = {
    "xpu.remap_hidden_states": "csrc/moe/remap_hidden_states.cpp",
    "vllm.cpu_unquantized": "csrc/cpu/cpu_fused_moe.cpp",
    "vllm.gpt_oss_triton": "vllm/model_executor/layers/fused_moe/experts/gpt_oss_triton_kernels_moe.py",
    "vllm.compressed_tensors.w4a8_int8": "csrc/moe/dynamic_4bit_int_moe_cpu.cpp",
}

IDS_DTYPES = {
    "transformers.eager": torch.int64,
    "transformers.batched_mm": torch.int64,
    "transformers.grouped_mm": torch.int32,
    "transformers.grouped_mm.cpu": torch.int64,
    "deep_ep": torch.int64,
    "vllm.deepep_ht": torch.int64,
    "vllm.deepep_ll": torch.int64,
    "vllm.deepep_v2": torch.int64,
    "pplx_kernels": torch.uint32,
    "mori": torch.int32,
    "vllm.mori": torch.int32,
    "nixl_ep": torch.int32,
    "nixl_ep.before_2026_06": torch.int64,
    "vllm.nixl_ep": torch.int32,  # with today's NIXL; vLLM's int64 is for builds that name no dtype
    "routing_replay": torch.int16,
    "triton_kernels": torch.int16,
    "triton_kernels.before_3.8": torch.int16,
    "vllm.gpt_oss_triton": torch.int64,
    "vllm.cpu_unquantized": torch.int32,
    "vllm.compressed_tensors.w4a8_int8": torch.int64,
    "vllm.cutlass_fp4": torch.int32,
    "vllm.eplb_map": torch.int32,
    "xpu.remap_hidden_states": torch.int32,
    "xpu.remap_hidden_states.before_0.1.8": torch.int64,
    "aiter.moe_sorting": torch.int32,
    "flashinfer.trtllm_gen": torch.int32,
    "deep_gemm.mega_moe": torch.int64,
    "gaudi.mixture_of_experts": torch.int64,
}


def test_names_are_unique_and_served_by_the_mapping():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert set(names) <= set(turnout.contracts)


@EACH_ENTRY
def test_entry_is_well_formed_and_sourced(entry):
    assert NAME.fullmatch(entry.name)
    assert REPOSITORY.fullmatch(entry.repository)
    assert entry.path
    assert not entry.path.startswith("/")
    assert entry.versions
    assert entry.evidence in ("run", "read")
    assert entry.reads.endswith(".")
    assert entry.commit or entry.note.startswith("open:"), "an unknown commit must be stated as an open point"


@EACH_ENTRY
def test_open_points_stand_at_the_start_of_the_note(entry):
    assert "open:" not in entry.note.removeprefix("open:")


@EACH_ENTRY
def test_the_contract_is_consistent_with_the_dtypes_accepted(entry):
    contract = turnout.contracts[entry.name]
    assert contract == entry.contract
    assert contract.ids_dtype not in entry.also_accepts
    assert set(contract.structures) <= set(STRUCTURES)
    if contract.ids_dtype == torch.uint32:
        assert contract.sentinel is None or contract.sentinel == "num_experts" or contract.sentinel >= 0


@pytest.mark.parametrize(("name", "path"), NAMED_IN_PR_40565.items(), ids=NAMED_IN_PR_40565)
def test_the_consumers_named_in_pr_40565_are_listed_with_the_file_that_reads(name, path):
    entry = turnout.contracts.entry(name)
    assert entry.path == path
    assert "PR #40565" in entry.note


@pytest.mark.parametrize(("name", "dtype"), IDS_DTYPES.items(), ids=IDS_DTYPES)
def test_ids_dtype(name, dtype):
    assert turnout.contracts[name].ids_dtype == dtype


def test_no_single_ids_dtype_serves_all_consumers():
    assert {entry.contract.ids_dtype for entry in ENTRIES} == {
        torch.int16,
        torch.int32,
        torch.uint32,
        torch.int64,
    }


@pytest.mark.parametrize(
    "name",
    ["triton_kernels", "triton_kernels.before_3.8", "gaudi.mixture_of_experts", "transformers.sonicmoe"],
)
def test_consumers_of_bfloat16_weights(name):
    assert turnout.contracts[name].weights_dtype == torch.bfloat16


def test_xpu_takes_both_dtypes_since_0_1_8_and_int64_alone_before():
    assert turnout.contracts.entry("xpu.remap_hidden_states").also_accepts == (torch.int64,)
    assert turnout.contracts.entry("xpu.remap_hidden_states.before_0.1.8").also_accepts == ()


@pytest.mark.parametrize(
    ("name", "sentinel"),
    [
        ("transformers.expert_parallel.local", "num_experts"),
        ("transformers.deepgemm_megamoe", -1),
        ("vllm.triton_experts", -1),
        ("vllm.compressed_tensors.w4a8_int8", None),  # an id out of range raises
        ("vllm.cpu_unquantized", None),  # an id out of range indexes a histogram
        ("xpu.remap_hidden_states.before_0.1.8", None),  # -1 would be read from the map
        ("pplx_kernels", None),
    ],
)
def test_sentinel(name, sentinel):
    assert turnout.contracts[name].sentinel == sentinel


@EACH_ENTRY
def test_route_writes_what_the_consumer_reads(entry):
    """For those that leave a size to each call, with one."""
    contract, inputs = entry.contract, None
    if set(contract.structures) & set(PADDED_BLOCK_MAP) and contract.block_size is None:
        contract = dataclasses.replace(contract, block_size=16)
    if contract.id_space == "local":
        contract = dataclasses.replace(contract, num_local_experts=contract.num_local_experts or 8)
        expert_map = torch.arange(32, dtype=torch.int32)
        inputs = turnout.RoutingInputs(expert_map=torch.where(expert_map < 8, expert_map, -1))
    routing = turnout.route(torch.randn(5, 32), turnout.RouterSpec(num_experts=32, top_k=4), contract, inputs)
    assert (routing.topk_ids.dtype, routing.topk_weights.dtype) == (contract.ids_dtype, contract.weights_dtype)
    written = {name for name, structure in zip(STRUCTURES, routing.permutation, strict=True) if structure is not None}
    assert written == set(contract.structures)


def test_structures_that_a_padded_block_map_needs():
    aligned = {"sorted_token_ids", "expert_ids", "num_tokens_post_padded"}
    for name in ("vllm.triton_experts", "vllm.marlin", "aiter.moe_sorting", "sglang.moe_align"):
        assert set(turnout.contracts[name].structures) == aligned
    assert turnout.contracts["triton_kernels"].structures == ("bitmatrix",)


def test_transformers_functions_take_no_structures():
    for entry in ENTRIES:
        if entry.name.startswith("transformers."):
            assert entry.contract.structures == ()
