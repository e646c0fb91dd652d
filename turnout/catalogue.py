"""The known consumers of routing: what each reads, and where that is known from.

`ENTRIES` is what `turnout.contracts` serves. The consumers in vLLM are in `catalogue_vllm`, the libraries
it calls (DeepEP, FlashInfer, AITER, ...) here. Producers of ids, such as fused top-k kernels, are not listed.
"""

from __future__ import annotations

import functools

import torch

from turnout.catalogue_own import OWN_ENTRIES
from turnout.catalogue_vllm import VLLM_ENTRIES
from turnout.contracts import CatalogueEntry, Contract

INT32 = Contract(ids_dtype=torch.int32)
INT64 = Contract(ids_dtype=torch.int64)
ALIGNED = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
MATMUL_OGS = (
    "tokens_per_expert", "expert_offsets", "permuted_idx", "inv_permuted_idx", "permuted_weights", "block_offsets",
    "block_schedule",
)  # fmt: skip

TRANSFORMERS_MOE = "src/transformers/integrations/moe.py"
TRANSFORMERS_EP = "src/transformers/distributed/expert_parallel.py"
WEIGHTS_FOLLOW_MODEL = (
    "Weights of any floating dtype are accepted and decide the dtype of the combine: float32 for Gemma 4, "
    "the model's dtype for Qwen and others."
)


def _transformers(
    name: str,
    contract: Contract,
    reads: str,
    *,
    path: str = TRANSFORMERS_MOE,
    versions: str = ">=5.17,<=5.23",
    ran: bool = True,
    also_accepts: tuple[torch.dtype, ...] = (),
    note: str = "",
) -> CatalogueEntry:
    return CatalogueEntry(
        name=f"transformers.{name}",
        contract=contract,
        reads=reads,
        repository="huggingface/transformers",
        path=path,
        commit="v5.23.0",
        versions=versions,
        evidence="run" if ran else "read",
        also_accepts=also_accepts,
        note=note,
    )


# Each transformers function computes its own order from the ids and takes no structures.
TRANSFORMERS = (
    _transformers(
        "eager",
        INT64,
        "one_hot of the ids, then a loop over the experts that were hit.",
        path="src/transformers/models/gemma4/modeling_gemma4.py",
        note="one_hot refuses every other dtype. " + WEIGHTS_FOLLOW_MODEL,
    ),
    _transformers(
        "batched_mm",
        INT64,
        "Gathers each slot's expert weights by indexing with the ids.",
        note="int32 gives the same result, but each of the two index operations (four with biases) casts it "
        "to int64 inside; int16 and uint32 raise. " + WEIGHTS_FOLLOW_MODEL,
    ),
    _transformers(
        "grouped_mm",
        INT32,
        "On CUDA: sorts the ids, then counts them with histc after a cast to int32.",
        ran=False,
        note="Experts with biases index them with the sorted ids: there int32 costs two casts, int64 one. "
        + WEIGHTS_FOLLOW_MODEL,
    ),
    _transformers(
        "grouped_mm.cpu",
        INT64,
        "On a CPU: sorts the ids, then counts them with histc after a cast to float32.",
        also_accepts=(torch.int16, torch.int32),
        note="Every dtype pays the cast to float32. Experts with biases index them with the sorted ids: "
        "there int64 is free, int32 costs two casts, int16 raises. uint32 raises in 5.17, not in 5.23.",
    ),
    _transformers(
        "sonicmoe",
        Contract(ids_dtype=torch.int32, weights_dtype=torch.bfloat16),
        "Casts ids to int32 and weights to the dtype of the hidden states.",
        path="src/transformers/integrations/sonicmoe.py",
        versions="==5.23",
        ran=False,
        note="Reads config.hidden_act, which Gemma 4 does not have: it would run as SwiGLU.",
    ),
    _transformers(
        "deepgemm",
        Contract(ids_dtype=torch.int32, weights_dtype=torch.bfloat16),
        "Sorts the ids, counts them as int32, indexes padding with them; casts weights to the output dtype.",
        path="src/transformers/integrations/deepgemm.py",
        versions="==5.23",
        ran=False,
        note="int32 costs one cast inside the index; int64 costs two to int32.",
    ),
    _transformers(
        "deepgemm_megamoe",
        Contract(ids_dtype=torch.int64, sentinel=-1),
        "Copies global ids and float32 weights into DeepGEMM's symmetric buffer.",
        path="src/transformers/integrations/deepgemm.py",
        versions="==5.23",
        ran=False,
        note="See deep_gemm.mega_moe: the copy goes away only if routing writes into the buffer.",
    ),
    _transformers(
        "expert_parallel.all_reduce",
        INT64,
        "What a router hands over under EP at inference: global ids, divided by the local expert count.",
        path=TRANSFORMERS_EP,
        versions=">=5.22,<=5.23",
        also_accepts=(torch.int16, torch.int32),
        note="The dtype is kept, so that the experts implementation below decides which one is free.",
    ),
    _transformers(
        "expert_parallel.all_to_all",
        INT64,
        "What a router hands over under EP in training: global ids, counted with scatter_add_.",
        path=TRANSFORMERS_EP,
        versions=">=5.22,<=5.23",
        note="Every other dtype raises.",
    ),
    _transformers(
        "expert_parallel.local",
        Contract(ids_dtype=torch.int64, id_space="local", sentinel="num_experts"),
        "What eager, batched_mm and grouped_mm get under EP: local ids, num_experts with weight 0 elsewhere.",
        versions=">=5.22,<=5.23",
        note="-1 is no substitute: eager raises, grouped_mm gives wrong results.",
    ),
)

_read = functools.partial(CatalogueEntry, evidence="read")

TRITON_KERNELS = (
    _read(
        name="triton_kernels",
        contract=Contract(ids_dtype=torch.int16, weights_dtype=torch.bfloat16, sentinel=-1, structures=("bitmatrix",)),
        reads="SparseMatrix: int16 ids, weights in the dtype of the logits, a uint32 bitmatrix.",
        repository="triton-lang/triton",
        path="python/triton_kernels/triton_kernels/topk.py",
        commit="02ed6565cd176dad22aa635d21c0fbe61211aab8",
        versions=">=3.8",
        note="open: that this commit, later than 3.6, is in a release 3.8 was not confirmed. The library's "
        "ids are int16 on both sides of 3.8; int64 with 3.8 is a cast of vLLM (vllm.gpt_oss_triton.0_32). "
        "Fewer than 32768 experts; 0xFFFF is reserved.",
    ),
    _read(
        name="triton_kernels.before_3.8",
        contract=Contract(ids_dtype=torch.int16, weights_dtype=torch.bfloat16, sentinel=-1, structures=("bitmatrix",)),
        reads="Bitmatrix (3.5) or SparseMatrix (3.6): int16 ids, weights in the dtype of the logits, bits.",
        repository="vllm-project/vllm",
        path="vllm/third_party/triton_kernels/topk.py",
        commit="4ba787ec9",
        versions=">=3.5,<3.8",
        note="The copy of 3.5.1 in vLLM v0.33.0. A slot without work has weight -1 for matmul_ogs.",
    ),
    CatalogueEntry(
        name="triton_kernels.matmul_ogs",
        evidence="run",
        contract=Contract(ids_dtype=torch.int16, weights_dtype=torch.bfloat16, sentinel=-1, structures=MATMUL_OGS),
        reads="RoutingData, GatherIndx and ScatterIndx: int32 counts, offsets, both permutations and the schedule of "
        "blocks of each size; the weights in permuted order.",
        repository="vllm-project/vllm",
        path="vllm/third_party/triton_kernels/matmul_ogs.py",
        commit="v0.26.0",
        versions=">=3.5,<3.6",
        also_accepts=(torch.int32, torch.uint32, torch.int64),
        note="What its own routing computes from the ids, in two launches after the top-k; the ids themselves are not "
        "read. Any float dtype of the weights. turnout.integrations.triton_kernels makes its objects.",
    ),
)

DISPATCHERS = (
    _read(
        name="deep_ep",
        contract=Contract(ids_dtype=torch.int64, sentinel=-1),
        reads="topk_idx_t: a signed integer of EP_NUM_TOPK_IDX_BITS bits, 64 unless built otherwise.",
        repository="deepseek-ai/DeepEP",
        path="deep_ep/include/deep_ep/common/compiled.cuh",
        commit="4dbea471a5c703fe8affbecce39d420543ecdf7d",
        versions="default build, up to 2026-07",
        note="-1 is a slot that goes nowhere. Rows received beyond the count are not initialised.",
    ),
    _read(
        name="pplx_kernels",
        contract=Contract(ids_dtype=torch.uint32),
        reads="Checks that indices are uint32, contiguous and 2-D, and weights float32.",
        repository="ppl-ai/pplx-kernels",
        path="csrc/bindings/all_to_all_ops.cpp",
        commit="0be423bd1fb3c815d2cd1f65cc21d84d5e4c20d5",
        versions="up to 2025-09",
        note="uint32 ids cannot index a tensor in torch.",
    ),
    _read(
        name="mori",
        contract=INT32,
        reads="int32 ids and float32 weights, through raw pointers.",
        repository="ROCm/mori",
        path="python/mori/ops/dispatch_combine.py",
        commit="624002c8",
        versions="up to 2026-08",
        note="Not checked: int64 ids are misread, every other id as 0 (SGLang #28074).",
    ),
    _read(
        name="nixl_ep",
        contract=INT32,
        reads="nixl_ep.topk_idx_t: int32 where the library was built with 32 bits, the default.",
        repository="ai-dynamo/nixl",
        path="examples/device/ep/nixl_ep/__init__.py",
        commit="01fee1e650561fe2dd508654cc7b9220a44bc9fb",
        versions="since 2026-06-18 (#1751), default build",
    ),
    _read(
        name="nixl_ep.before_2026_06",
        contract=INT64,
        reads="int64 ids; also later builds with 64 bits.",
        repository="ai-dynamo/nixl",
        path="examples/device/ep/nixl_ep/__init__.py",
        versions="before 2026-06-18, or built with 64 bits",
        note="open: no commit before #1751 was read; int64 follows from the later file and from vLLM.",
    ),
    _read(
        name="nccl_ep",
        contract=INT64,
        reads="int64 ids and float32 weights.",
        repository="NVIDIA/nccl",
        path="contrib/nccl_ep/README.md",
        commit="5067397c",
        versions="up to 2026-06",
        note="int32 too from 2.31.0a14 (TransformerEngine #3185). Low-latency dispatch returns int32 and -1.",
    ),
    _read(
        name="flashinfer.nvlink_a2a",
        contract=INT32,
        reads="int32 ids and float32 weights, one- and two-sided.",
        repository="flashinfer-ai/flashinfer",
        path="flashinfer/comm/trtllm_moe_alltoall.py",
        commit="fb28d7242",
        versions="up to 2026-08",
        note="Slots it did not receive can be set to invalid_token_expert_id.",
    ),
)

KERNEL_LIBRARIES = (
    _read(
        name="flashinfer.trtllm_gen",
        contract=Contract(ids_dtype=torch.int32, sentinel=-1),
        reads="A pair of int32 ids and bfloat16 or float32 weights; it routes the permutation itself.",
        repository="flashinfer-ai/flashinfer",
        path="csrc/trtllm_fused_moe_kernel_launcher.cu",
        commit="fb28d7242",
        versions="up to 2026-08",
        note="Global ids; -1 is inactive.",
    ),
    _read(
        name="flashinfer.trtllm_gen.packed",
        contract=Contract(ids_dtype=torch.int32, weights_dtype=torch.bfloat16, sentinel=-1),
        reads="One int32 per slot: the id in the high half, the bits of the bfloat16 weight in the low half.",
        repository="flashinfer-ai/flashinfer",
        path="csrc/trtllm_fused_moe_kernel_launcher.cu",
        commit="fb28d7242",
        versions="up to 2026-08",
        note="open: a Contract states ids and weights apart, so packing stays a launch of its own. Being "
        "retired upstream (FlashInfer #3763, vLLM #46872).",
    ),
    _read(
        name="flashinfer.cutlass_fused_moe",
        contract=INT32,
        reads="Checks that ids are int32 and 2-D; float32 weights.",
        repository="flashinfer-ai/flashinfer",
        path="csrc/fused_moe/cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu",
        commit="fb28d7242",
        versions="up to 2026-08",
        note="One expert several times in a row of ids has ended in an illegal memory access (vLLM #39391).",
    ),
    _read(
        name="aiter.moe_sorting",
        contract=Contract(ids_dtype=torch.int32, structures=ALIGNED),
        reads="int32 ids and float32 weights, sorted into padded blocks.",
        repository="ROCm/aiter",
        path="aiter/fused_moe.py",
        commit="e4048607a5",
        versions="up to 2026-08",
        note="-1 is not safe: expert 0 with weight 0 on one path, an illegal access on another (#4636).",
    ),
    _read(
        name="aiter.fused_routing_from_topk",
        contract=Contract(ids_dtype=torch.int32, structures=("tokens_per_expert", "permuted_idx", "inv_permuted_idx")),
        reads="Flat int32 ids (others are cast), weights of any dtype; T*K at most 4096.",
        repository="ROCm/aiter",
        path="aiter/ops/triton/fusions/fused_routing_from_topk.py",
        commit="369be16f0a04ef4fab8c4bb0750594522d8ce8d1",
        versions="up to 2026-08",
        note="Ids must lie in [0, E).",
    ),
    _read(
        name="deep_gemm.mega_moe",
        contract=Contract(ids_dtype=torch.int64, sentinel=-1),
        reads="int64 ids and float32 weights in views of its symmetric buffer.",
        repository="deepseek-ai/DeepGEMM",
        path="csrc/apis/mega.hpp",
        commit="093597f4691846f39d58d4a48d090d2e03741042",
        versions="up to 2026-08",
        note="A copy into the buffer follows unless routing writes there itself.",
    ),
    _read(
        name="sglang.moe_align",
        contract=Contract(ids_dtype=torch.int32, structures=ALIGNED),
        reads="Ids of any integer dtype, sorted into padded blocks.",
        repository="sgl-project/sglang",
        path="sgl-kernel/csrc/moe/moe_align_kernel.cu",
        commit="ce3781545c8ba6625e63fa96952c1d3938f6055c",
        versions="up to 2026-08",
        also_accepts=(torch.int16, torch.int64),
        note="Older versions do not check that an id is in range.",
    ),
    _read(
        name="sglang.cpu_fused_experts",
        contract=INT32,
        reads="Contiguous int32 ids, checked; weights are cast to float32.",
        repository="sgl-project/sglang",
        path="sgl-kernel/csrc/cpu/moe.cpp",
        commit="668c67c27a7e041d817b47da8d84ffac82ab9223",
        versions="up to 2026-08",
        note="Ids are not checked against the number of experts.",
    ),
)

TRAINING_AND_OTHERS = (
    _read(
        name="megatron.token_dispatcher",
        contract=INT64,
        reads="int64 ids, and a bool map of tokens to experts made from them.",
        repository="NVIDIA/Megatron-LM",
        path="megatron/core/transformer/moe/token_dispatcher.py",
        commit="d98e8a64dd",
        versions="up to 2026-08",
        note="The NVLS dispatcher for inference pads with -1; the others do not know it.",
    ),
    _read(
        name="torchtitan.token_reorderer",
        contract=Contract(ids_dtype=torch.int64, structures=("tokens_per_expert", "permuted_idx")),
        reads="int64 ids of torch.topk: histc counts them, a stable argsort orders them.",
        repository="pytorch/torchtitan",
        path="torchtitan/models/common/moe/moe.py",
        commit="0646ba46a5b9a263e50335aa9948cfcdf78db8a2",
        versions="up to 2026-08",
    ),
    _read(
        name="megablocks",
        contract=Contract(ids_dtype=torch.int32, structures=("tokens_per_expert", "permuted_idx")),
        reads="Casts ids to int32 for radix sort and histogram; weights in the dtype of the logits.",
        repository="databricks/megablocks",
        path="megablocks/layers/moe.py",
        commit="78eea65",
        versions="up to 2025-06",
    ),
    _read(
        name="gaudi.mixture_of_experts",
        contract=Contract(ids_dtype=torch.int64, weights_dtype=torch.bfloat16),
        reads="int64 ids, weights in the dtype of the hidden states; others fail to compile.",
        repository="vllm-project/vllm-gaudi",
        path="vllm_gaudi/ops/hpu_fp8.py",
        versions="since 2026-07-03 (#1593)",
        note="open: commit not known, the dtypes are from #1593 and #1586. Ranks above 0 drop global ids "
        "(#1796); which id space they want was not settled.",
    ),
    _read(
        name="ascend.moe_init_routing",
        contract=Contract(ids_dtype=torch.int32, structures=("tokens_per_expert", "inv_permuted_idx")),
        reads="npu_moe_init_routing_v2 takes int32 ids; combine takes float32 weights.",
        repository="vllm-project/vllm-ascend",
        path="vllm_ascend/ops/fused_moe/token_dispatcher.py",
        versions="up to 2026-08",
        note="open: commit not known, from SGLang #40149 and #39351, vllm-ascend #14961. Some dispatchers "
        "cast the weights to the dtype of the hidden states.",
    ),
)

ENTRIES: tuple[CatalogueEntry, ...] = (
    *OWN_ENTRIES,
    *TRANSFORMERS,
    *VLLM_ENTRIES,
    *TRITON_KERNELS,
    *DISPATCHERS,
    *KERNEL_LIBRARIES,
    *TRAINING_AND_OTHERS,
)
