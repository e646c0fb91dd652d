"""The consumers inside vLLM: experts, dispatchers, and what reads ids between the router and them.

Read in the Python sources of releases 0.28.0, 0.32.0 and 0.33.0; C++ sources are cited with their own commit.
"""

from __future__ import annotations

import torch

from turnout.contracts import CatalogueEntry, Contract

RELEASE = "4ba787ec9"  # v0.33.0
FUSED_MOE = "vllm/model_executor/layers/fused_moe/"

# moe_align_block_size dispatches on the dtype of the ids and skips negative ones.
ALIGNED = Contract(
    ids_dtype=torch.int32,
    sentinel=-1,
    structures=("sorted_token_ids", "expert_ids", "num_tokens_post_padded"),
)
XPU_STRUCTURES = ("tokens_per_expert", "inv_permuted_idx")
PERMUTED = ("expert_offsets", "permuted_idx", "inv_permuted_idx")
INT32 = Contract(ids_dtype=torch.int32)
INT64 = Contract(ids_dtype=torch.int64)
DEEP_EP = Contract(ids_dtype=torch.int64, sentinel=-1)


def _vllm(
    name: str,
    contract: Contract,
    path: str,
    reads: str,
    *,
    versions: str = ">=0.28,<=0.33",
    commit: str = RELEASE,
    also_accepts: tuple[torch.dtype, ...] = (),
    note: str = "",
) -> CatalogueEntry:
    return CatalogueEntry(
        name=f"vllm.{name}",
        contract=contract,
        reads=reads,
        repository="vllm-project/vllm",
        path=path,
        commit=commit,
        versions=versions,
        evidence="read",
        also_accepts=also_accepts,
        note=note,
    )


GPU_EXPERTS = (
    _vllm(
        "triton_experts",
        ALIGNED,
        FUSED_MOE + "experts/triton_moe.py",
        "moe_align_block_size sorts the ids into padded blocks; the kernel multiplies by float32 weights.",
        also_accepts=(torch.int16, torch.int64),
    ),
    _vllm(
        "marlin",
        ALIGNED,
        FUSED_MOE + "experts/marlin_moe.py",
        "moe_align_block_size sorts the ids into padded blocks; float32 weights are asserted.",
        also_accepts=(torch.int16, torch.int64),
        note="Also runs the WNA16 classes of compressed_tensors.",
    ),
    _vllm(
        "batched_experts",
        Contract(ids_dtype=torch.int32, sentinel=-1),
        FUSED_MOE + "prepare_finalize/batched.py",
        "Compares the ids with int64 ids of the local experts in one operation, with no cast of its own.",
        also_accepts=(torch.int16, torch.int64),
        note="Any id that names no local expert is skipped.",
    ),
    _vllm(
        "deep_gemm",
        Contract(ids_dtype=torch.int32, sentinel=-1, structures=("tokens_per_expert", "inv_permuted_idx")),
        FUSED_MOE + "deep_gemm_utils.py",
        "A Triton kernel counts and scatters tokens by their ids; it asserts a signed dtype.",
        also_accepts=(torch.int16, torch.int64),
    ),
    _vllm(
        "moe_permute",
        Contract(ids_dtype=torch.int32, structures=PERMUTED),
        FUSED_MOE + "moe_permute_unpermute.py",
        "The permute operator takes int32 ids; other dtypes are copied to int32 before it.",
        note="Its expert offsets are int64. Ids that are not local are pushed past the end.",
    ),
    _vllm(
        "cutlass_fp8",
        Contract(ids_dtype=torch.int32, structures=PERMUTED),
        FUSED_MOE + "experts/cutlass_moe.py",
        "Goes through moe_permute, and takes the problem sizes from its offsets.",
    ),
    _vllm(
        "cutlass_fp4",
        Contract(ids_dtype=torch.int32, sentinel=-1, structures=PERMUTED),
        "csrc/libtorch_stable/quantization/w8a8/cutlass/moe/moe_data.cu",
        "get_cutlass_moe_mm_data reads the ids as int32 and makes expert offsets and both permutations.",
        commit="e8dfcc7c9f1d527db82411254e99ec4f943dd1e1",
        note="int64 ids raise where the pointer is typed (this commit), and are misread where it is a plain "
        "cast (other versions). -1 gives a row of zeros.",
    ),
    _vllm(
        "trtllm",
        Contract(ids_dtype=torch.int32, sentinel=-1),
        FUSED_MOE + "experts/trtllm_bf16_moe.py",
        "Casts to int32, then hands (ids, weights) to FlashInfer; fp8, mxfp4 and nvfp4 do the same.",
        versions=">=0.32,<=0.33",
        note="0.28.0 packs ids of any integer dtype and weights into one int32 per slot, in a launch of its "
        "own; releases between were not read.",
    ),
    _vllm(
        "flashinfer_cutlass",
        INT32,
        FUSED_MOE + "experts/flashinfer_cutlass_moe.py",
        "Casts the ids to int32 for FlashInfer's cutlass_fused_moe; weights go as they are.",
    ),
    _vllm(
        "flashinfer_cutedsl",
        INT32,
        FUSED_MOE + "experts/flashinfer_cutedsl_moe.py",
        "Casts the ids to int32 and the weights to float32.",
    ),
    _vllm(
        "flashinfer_b12x",
        INT32,
        FUSED_MOE + "experts/flashinfer_b12x_moe.py",
        "Casts the ids to int32; weights go as they are.",
        note="The newer b12x.py takes contiguous int32 and float32 too, and raises where a cast would be "
        "needed inside a CUDA graph capture.",
    ),
    _vllm(
        "flashinfer_moe_ep",
        INT32,
        FUSED_MOE + "flashinfer_moe_ep.py",
        "Dispatcher and experts in one; declares int32.",
        versions=">=0.32,<=0.33",
        note="0.28.0 has no such file; releases between were not read.",
    ),
    _vllm(
        "aiter",
        INT32,
        FUSED_MOE + "experts/rocm_aiter_moe.py",
        "Casts ids to int32 and weights to float32 for AITER's fused_moe.",
    ),
    _vllm(
        "flydsl",
        Contract(ids_dtype=torch.int32, structures=("sorted_token_ids", "expert_ids", "num_tokens_post_padded")),
        FUSED_MOE + "fused_flydsl_moe.py",
        "Casts to int32 and float32, then sorts with AITER's moe_sorting.",
    ),
    _vllm(
        "gpt_oss_triton",
        Contract(ids_dtype=torch.int64, sentinel=-1, structures=("tokens_per_expert", "permuted_idx")),
        FUSED_MOE + "experts/gpt_oss_triton_kernels_moe.py",
        "With triton_kernels 3.8: sorts the ids in their own dtype and counts by binary search.",
        versions="==0.33 with triton_kernels >=3.8",
        also_accepts=(torch.int16, torch.int32),
        note="Consumer named in PR #40565. -1 goes to expert 0 with weight 0. Under expert parallelism the "
        "remap to local ids reads any integer and writes int64.",
    ),
    _vllm(
        "gpt_oss_triton.0_32",
        Contract(ids_dtype=torch.int64, sentinel=-1, structures=("tokens_per_expert", "permuted_idx")),
        FUSED_MOE + "experts/gpt_oss_triton_kernels_moe.py",
        "With triton_kernels 3.8: casts the ids to int64, then sorts them.",
        versions="==0.32 with triton_kernels >=3.8",
        commit="v0.32.0",
    ),
    _vllm(
        "gpt_oss_triton.before_triton_kernels_3_8",
        Contract(
            ids_dtype=torch.int16,
            weights_dtype=torch.bfloat16,
            sentinel=-1,
            structures=("bitmatrix",),
        ),
        FUSED_MOE + "experts/gpt_oss_triton_kernels_moe.py",
        "Casts ids to int16 and weights to bfloat16, packs a bitmatrix, marks unused slots with weight -1.",
        versions=">=0.28,<=0.33 with triton_kernels <3.8",
        note="Under expert parallelism a remap reads any integer and writes int64; the cast to int16 comes after it.",
    ),
    _vllm(
        "xpu_experts",
        Contract(ids_dtype=torch.int32, sentinel=-1),
        FUSED_MOE + "experts/xpu_moe.py",
        "Passes the ids on to xpu.remap_hidden_states.",
        also_accepts=(torch.int64,),
        versions=">=0.28,<=0.33 with vllm-xpu-kernels >=0.1.8",
        note="Under expert parallelism negative ids are replaced by an expert of another rank (0.32, 0.33), "
        "in one more launch, because the operator would read its map at -1.",
    ),
)

CPU_EXPERTS = (
    CatalogueEntry(
        name="vllm.cpu_unquantized",
        contract=INT32,
        reads="cpu_fused_moe reads contiguous int32 ids and float32 weights through raw pointers.",
        repository="vllm-project/vllm",
        path="csrc/cpu/cpu_fused_moe.cpp",
        commit="e4d64318a8486bcea8d8fa9ce940be9e807dfa44",
        versions=">=0.28,<=0.33",
        evidence="run",
        note="Consumer named in PR #40565 as reading int64: it does not. int64 raises (seen with 0.30 to "
        "0.32), strides are ignored, ids index a histogram unchecked.",
    ),
    CatalogueEntry(
        name="vllm.cpu_fused_experts",
        contract=INT32,
        reads="fused_experts_cpu (fp8, mxfp4, int8) reads int32 ids and float32 weights.",
        repository="vllm-project/vllm",
        path="csrc/cpu/sgl-kernels/moe.cpp",
        commit="466716c2bb5f3d191eeaf25459ec6c3bb09f11d7",
        versions=">=0.30,<=0.32",
        evidence="run",
        note="int64 gives the right result through a cast inside the operator.",
    ),
    _vllm(
        "cpu_fused_moe_int8",
        INT32,
        FUSED_MOE + "experts/cpu_moe.py",
        "Hands int32 ids and float32 weights, as its router writes them, to cpu_fused_moe_int8, on Arm and Power.",
        versions=">=0.30,<=0.32",
        commit="v0.32.0",
        note="open: the operator itself was not read; beside it, cpu_fused_moe refuses all but int32.",
    ),
    _vllm(
        "cpu_torch_fallback",
        INT64,
        FUSED_MOE + "cpu_fused_moe.py",
        "Counts tokens with scatter_, whose index must be int64, and sorts the flattened ids.",
        versions="<0.28",
        commit="58dfc6e54e9bbf40c289eb25e8c313fa2900bd52",
        note="The int64 reader in the file that PR #40565 names; gone in 0.28. An id that comes twice in a "
        "row is counted once.",
    ),
    _vllm(
        "compressed_tensors.w4a8_int8",
        INT64,
        "csrc/moe/dynamic_4bit_int_moe_cpu.cpp",
        "The Arm operator reads int64 ids through a typed pointer and casts the weights to float32.",
        commit="00e2d64a9dce99e8eab8e859fb9b8e5eb8a51bec",
        note="Consumer named in PR #40565. An id outside [0, E) raises, so there is no sentinel. vLLM routes "
        "to int32 itself, then casts to int64 (experts/cpu_int4_moe.py). Other compressed_tensors classes "
        "delegate to the experts above.",
    ),
    _vllm(
        "zentorch",
        INT32,
        FUSED_MOE + "experts/zentorch_moe.py",
        "Routes by itself to int32 ids and hands them to the operator zentorch_fused_moe.",
        versions=">=0.32,<=0.33",
        note="The operator itself is a binary: not read. 0.28.0 has no such file.",
    ),
)

BETWEEN = (
    _vllm(
        "default",
        INT32,
        FUSED_MOE + "prepare_finalize/no_dp_ep.py",
        "Declares no dtype: routers then write int32, and the experts read it as listed above.",
        note="Also naive_dp_ep and FlashInfer's two-sided NVLink dispatcher. The routing simulator takes no "
        "dtype to mean int64, which makes CPU experts raise (0.30 to 0.32).",
    ),
    _vllm(
        "eplb_map",
        Contract(ids_dtype=torch.int32, sentinel=-1),
        FUSED_MOE + "router/base_router.py",
        "Maps logical to physical ids and counts load; it copies the ids to contiguous int32 first.",
        note="The result has the dtype it was given: int64 ids cost a copy here. Ids out of range become -1.",
    ),
    _vllm(
        "routed_experts_capture",
        INT32,
        FUSED_MOE + "routed_experts_capturer.py",
        "Stores each layer's logical ids, before any map, in an int32 buffer; replies are uint8 or uint16.",
    ),
    _vllm(
        "deepep_ht",
        Contract(ids_dtype=torch.int64, sentinel=-1, structures=("tokens_per_expert",)),
        FUSED_MOE + "prepare_finalize/deepep_ht.py",
        "Declares int64; counts tokens per expert and rank, then dispatches.",
        note="Ids that come back are local, with -1; vLLM turns -1 into an expert of another rank.",
    ),
    _vllm(
        "deepep_ll",
        DEEP_EP,
        FUSED_MOE + "prepare_finalize/deepep_ll.py",
        "Declares int64; may map the ids to physical ones by indexing.",
    ),
    _vllm("deepep_v2", DEEP_EP, FUSED_MOE + "prepare_finalize/deepep_v2.py", "Declares int64."),
    _vllm(
        "nixl_ep",
        INT32,
        FUSED_MOE + "prepare_finalize/nixl_ep.py",
        "Declares getattr(nixl_ep, 'topk_idx_t', torch.int64): the module's own dtype, int64 where it names none.",
        note="The same line in the wheels of 0.26 and 0.28 to 0.32 (vLLM #45298), so that NIXL decides: int32 in its "
        "default build since 2026-06-18, int64 before and with 64 bits (nixl_ep.before_2026_06). The plugin takes what "
        "is declared at run time. With physical ids mapped by indexing, int32 costs a cast inside the index.",
    ),
    _vllm("mori", INT32, FUSED_MOE + "prepare_finalize/mori.py", "Declares int32."),
    _vllm(
        "moonep",
        INT32,
        FUSED_MOE + "prepare_finalize/moonep.py",
        "Declares int32; float32 weights.",
        versions=">=0.31,<=0.33",
        note="Has no sentinel: vLLM sends negative ids to expert 0 with weight 0.",
    ),
    _vllm(
        "flashinfer_nvlink_one_sided",
        INT32,
        FUSED_MOE + "prepare_finalize/flashinfer_nvlink_one_sided.py",
        "Declares int32.",
    ),
    CatalogueEntry(
        name="routing_replay",
        contract=Contract(ids_dtype=torch.int16),
        reads="A buffer of int16 logical ids, T x K for each layer, written before any map.",
        repository="vllm-project/vllm",
        path="vllm/model_executor/layers/fused_moe/routed_experts_capturer.py",
        commit="4ba787ec9",
        versions=">=0.28,<=0.33",
        evidence="read",
        note="What monolithic kernels fill (routing_replay_out, FlashInfer's too), and ATOM #2274. vLLM's "
        "modular path keeps int32 (vllm.routed_experts_capture). Weights are not recorded.",
    ),
)

XPU = (
    CatalogueEntry(
        name="xpu.remap_hidden_states",
        contract=Contract(ids_dtype=torch.int32, sentinel=-1, structures=XPU_STRUCTURES),
        reads="Counts rows per expert and scatters rows by contiguous int32 or int64 ids.",
        repository="vllm-project/vllm-xpu-kernels",
        path="csrc/moe/remap_hidden_states.cpp",
        commit="4df22ff1fe13259ee4c0dec2e37643b54aa55ab0",
        versions=">=0.1.8",
        evidence="read",
        also_accepts=(torch.int64,),
        note="Consumer named in PR #40565. Without an expert_map -1 is skipped; with one, the map is read at "
        "-1, out of bounds. The Python wrapper of 0.1.16.2 says instead that all-negative rows reach expert "
        "0, and zeroes them first (a compare, a reduction, a copy). K is one of a fixed list.",
    ),
    CatalogueEntry(
        name="xpu.remap_hidden_states.before_0.1.8",
        contract=Contract(ids_dtype=torch.int64, structures=XPU_STRUCTURES),
        reads="Counts and scatters by int64 ids; the Python wrapper casts int32 to int64 on every call.",
        repository="vllm-project/vllm-xpu-kernels",
        path="csrc/moe/remap_hidden_states.cpp",
        commit="2fa2976",
        versions="<0.1.8",
        evidence="read",
        note="The copy that PR #40565 set out to remove; 702c024 (2026-04-28) removed it here. The wrapper "
        "always passes an expert_map, which -1 would read out of bounds.",
    ),
)

VLLM_ENTRIES: tuple[CatalogueEntry, ...] = (*GPU_EXPERTS, *CPU_EXPERTS, *XPU, *BETWEEN)
