"""Failures that users of other routing kernels reported, each as a test of ours; the name carries the report.

The reports are numbered as in the collection this project started from; most are of vLLM, SGLang and AITER.
Producers of ids and weights, and so tested here for every implementation:

    1 to 12, 14, 15, 18 to 25, 27, 29 to 34

(9 and 14 of tables by token id, 18 and 19 of replicas and load: here what is refused; what they compute is tested in
test_families.py and test_replicas.py.)

Of local ids and structures, in tests/permutation/test_field_failures_of_structures.py:

    11, 13, 16, 17, 26, 28, 29
"""

import pytest
import torch

import turnout
from turnout.contracts import IDS_DTYPES, WEIGHTS_DTYPES
from turnout.testing.checks import assert_bitwise_equal, oracle
from turnout.testing.inputs import every_kind_of_row, make_logits, poisoned_out

GEMMA4 = turnout.RouterSpec(num_experts=128, top_k=8, renormalize=True)
SCALED = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True, per_expert_scale=True)
INT64 = turnout.Contract(ids_dtype=torch.int64)
PADDED = turnout.Contract(ids_dtype=torch.int64, sentinel=-1)
EACH_IDS_DTYPE = pytest.mark.parametrize("ids_dtype", IDS_DTYPES, ids=str)


@EACH_IDS_DTYPE
def test_every_element_of_the_buffer_is_written_vllm_55147_aiter_5255(ids_dtype, device, routed):
    """1: int32 was written into an int64 buffer, so that 14 of 1536 ids were valid."""
    logits = make_logits("normal", 16, 128, device=device)
    routed(logits, GEMMA4, turnout.Contract(ids_dtype=ids_dtype))  # poisoned buffers; every id is checked


def test_nan_rows_give_distinct_ids_vllm_39391(device, routed):
    """2: NaN in the padding rows of a graph gave the same expert K times, then an illegal memory access."""
    routed(every_kind_of_row(128, torch.bfloat16, device, ("one_nan", "few_finite", "all_nan"), 3), GEMMA4, INT64)


def test_all_nan_row_stays_below_num_experts_sglang_30079(device, routed):
    """3: an all-NaN row gave the id E + 1, which the next kernel took for an expert."""
    spec = turnout.RouterSpec(num_experts=129, top_k=8, renormalize=True)
    routed(every_kind_of_row(129, torch.float32, device, ("all_nan", "nan_and_minus_inf")), spec, INT64)


def test_infinite_rows_stay_in_range_aiter_4530(device, routed):
    """4: Inf and NaN in padding rows gave ids out of range under a graph."""
    names = ("one_inf", "some_infs", "all_inf", "all_minus_inf", "not_finite")
    routed(every_kind_of_row(128, torch.float32, device, names, 2), GEMMA4, INT64)


@pytest.mark.gpu
def test_infinite_rows_stay_in_range_in_a_graph_aiter_4530(gpu):
    """4, as reported: captured with good logits, replayed with bad ones."""
    logits = make_logits("normal", 4, 128, device=gpu)
    turnout.route(logits, GEMMA4, INT64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = turnout.route(logits, GEMMA4, INT64)
    logits.copy_(every_kind_of_row(128, torch.float32, gpu, ("all_inf", "all_minus_inf", "all_nan", "not_finite")))
    graph.replay()
    assert_bitwise_equal(routing, turnout.route(logits, GEMMA4, INT64))
    assert (routing.topk_ids < 128).all()


def test_nan_among_896_experts_tokenspeed_605(device, routed):
    """5: NaN gave the id E, at the sizes of Kimi K3."""
    spec = turnout.RouterSpec(num_experts=896, top_k=16, renormalize=True)
    routed(every_kind_of_row(896, torch.float32, device, ("one_nan", "few_finite", "all_nan")), spec, INT64)


@pytest.mark.parametrize("num_experts", [7, 60])
def test_padding_lanes_lose_to_minus_inf_onnxruntime_28980(num_experts, device, routed):
    """6: -inf tied with the lanes past the last expert, whose id leaked out."""
    spec = turnout.RouterSpec(num_experts=num_experts, top_k=6, renormalize=True)
    names = ("one_finite", "all_minus_inf", "nan_and_minus_inf", "few_finite")
    routed(every_kind_of_row(num_experts, torch.float32, device, names), spec, INT64)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fewer_than_k_finite_logits_give_distinct_ids_trtllm_sglang_moe_fused_gate(logits_dtype, device, routed):
    """7: rows with fewer than K finite logits repeated the id 0."""
    names = ("one_finite", "few_finite", "all_minus_inf")
    routed(every_kind_of_row(128, logits_dtype, device, names, 4), GEMMA4, INT64)


@EACH_IDS_DTYPE
def test_dtype_returned_is_the_dtype_asked_for_sglang_28074(ids_dtype, impl, device):
    """8: int64 ids reached an int32 pointer, and every other id was 0."""
    logits = make_logits("normal", 4, 128, device=device)
    routing = turnout.route(logits, GEMMA4, turnout.Contract(ids_dtype=ids_dtype), impl=impl)
    assert routing.topk_ids.dtype == ids_dtype
    assert routing.topk_ids.untyped_storage().nbytes() == 4 * 8 * ids_dtype.itemsize


def test_uint32_ids_are_written_not_indexed_by_vllm_20166(device, routed):
    """10: uint32 ids cannot index in torch; changing them to int32 broke the consumer that wants uint32."""
    for logits_dtype in (torch.float32, torch.bfloat16):
        names = ("normal", "tie_free", "all_nan")
        routed(every_kind_of_row(128, logits_dtype, device, names), GEMMA4, turnout.Contract(ids_dtype=torch.uint32))


def test_int64_ids_with_bfloat16_weights_vllm_gaudi_1593(device, routed):
    """11: a consumer of int64 ids and bfloat16 weights. (Its local ids are tested beside the permutation.)"""
    contract = turnout.Contract(ids_dtype=torch.int64, weights_dtype=torch.bfloat16)
    logits = make_logits("normal", 4, 128, device=device)
    routed(logits, GEMMA4, contract)


def test_int64_ids_index_without_a_cast_rtp_llm_1325(impl, device):
    """12: int32 ids failed in scatter and gather of torch-native experts."""
    logits = make_logits("normal", 4, 128, device=device)
    ids = turnout.route(logits, GEMMA4, INT64, impl=impl).topk_ids
    counts = torch.zeros(4, 128, device=device).scatter_(1, ids, 1.0)
    assert (counts.sum(dim=1) == 8).all()


def test_sentinel_slots_weigh_exactly_zero_vllm_48371(device, routed):
    """15: what the id -1 multiplied was not zero, and 98% of the output elements were wrong."""
    padding = torch.tensor([True, False, True, False], device=device)
    logits = every_kind_of_row(128, torch.float32, device, ("all_inf", "normal", "all_nan", "tie_free"))
    routing = routed(logits, GEMMA4, PADDED, turnout.RoutingInputs(is_padding=padding))
    assert (routing.topk_weights[padding].view(torch.int32) == 0).all()  # +0.0, not -0.0
    assert (routing.topk_ids[padding] == -1).all()


@pytest.mark.parametrize("how", ["is_padding", "num_valid_tokens"])
def test_padding_rows_are_not_routed_vllm_46428_sglang_31838(how, device, routed):
    """20: routers that ignored padding sent padded rows to experts as real work."""
    padding = {
        "is_padding": torch.arange(24, device=device) >= 13,
        "num_valid_tokens": torch.tensor([13], dtype=torch.int32, device=device),
    }
    logits = make_logits("normal", 24, 128, device=device)
    logits[13:] = float("nan")
    routing = routed(logits, GEMMA4, PADDED, turnout.RoutingInputs(**{how: padding[how]}))
    assert int((routing.topk_ids == -1).all(dim=1).sum()) == 11


def test_ties_are_the_same_in_every_run_vllm_55514(impl, device):
    """21: a top-k that broke ties anew in each run."""
    logits = make_logits("quantised", 8, 16, device=device)
    spec = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
    first = turnout.route(logits, spec, INT64, impl=impl)
    for _ in range(100):
        assert_bitwise_equal(turnout.route(logits, spec, INT64, impl=impl), first)


def test_oracle_breaks_ties_by_lowest_id_vllm_52679(device, routed):
    """22: torch.topk promises no order of ties, so it cannot judge them; ours is a stable sort."""
    logits = make_logits("all_equal", 2, 16, device=device)
    spec = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
    assert oracle(logits, spec)[1].tolist() == [[0, 1, 2, 3]] * 2
    assert routed(logits, spec, INT64).topk_ids.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("num_experts", [258, 384])
def test_many_ties_past_256_experts_openvino_35691(num_experts, device, routed):
    """23: ids from 256 on were cut to 8 bits, and ties hid it."""
    spec = turnout.RouterSpec(num_experts=num_experts, top_k=8, renormalize=True)
    logits = make_logits("quantised", 4, num_experts, device=device)
    logits[:, -1] = 9.0  # the last id is certain to be chosen
    assert (routed(logits, spec, turnout.Contract(ids_dtype=torch.int16)).topk_ids[:, 0] == num_experts - 1).all()


def test_ids_beyond_int16_are_refused_openvino_35691(impl, device):
    """23 again: ids that the dtype cannot hold are refused, not cut."""
    int16 = turnout.Contract(ids_dtype=torch.int16)
    spec = turnout.RouterSpec(num_experts=32769, top_k=2)
    with pytest.raises(ValueError, match="int16 cannot hold the ids of 32769 experts; choose a contract with a wider"):
        turnout.route(torch.zeros(1, 32769, device=device), spec, int16, impl=impl)


def test_padding_lanes_lose_to_negative_logits_vllm_37605(device, routed):
    """24: lanes past the last expert scored 0 and beat rows in which every logit is negative."""
    for num_experts in (60, 129):
        spec = turnout.RouterSpec(num_experts=num_experts, top_k=8, renormalize=True)
        routed(make_logits("all_negative", 4, num_experts, device=device), spec, INT64)


@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES, ids=str)
def test_weights_are_of_the_dtype_they_say_flashinfer_3595(weights_dtype, device, routed):
    """25: bfloat16 weights lay in a buffer labelled float32."""
    routed(make_logits("normal", 5, 128, device=device), GEMMA4, turnout.Contract(weights_dtype=weights_dtype))


def test_a_new_scale_takes_effect_at_once_vllm_42239(device, routed):
    """27: a scale captured when the router was built outlived the parameter it came from."""
    logits = make_logits("normal", 4, 16, device=device)
    scale = torch.linspace(0.5, 1.5, 16, device=device)
    routed(logits, SCALED, INT64, turnout.RoutingInputs(per_expert_scale=scale))
    routed(logits, SCALED, INT64, turnout.RoutingInputs(per_expert_scale=scale.flip(0)))
    scale.mul_(2)  # in place: the same tensor, new values
    routed(logits, SCALED, INT64, turnout.RoutingInputs(per_expert_scale=scale))


def test_sizes_of_gemma4_metax_270(device, routed):
    """29: E=128, K=8 was sent to the wrong specialisation; all other sizes are in test_grid.py."""
    for name in ("normal", "quantised", "bit_patterns"):
        routed(make_logits(name, 16, 128, torch.bfloat16, device), GEMMA4, INT64)


def test_compiled_dtypes_equal_eager_torch_spyre_3635(impl, device):
    """30: a compiler dropped the conversion to int32 and returned int64."""
    torch._dynamo.reset()
    logits = make_logits("normal", 4, 128, device=device)
    for ids_dtype in IDS_DTYPES:
        contract = turnout.Contract(ids_dtype=ids_dtype, weights_dtype=torch.bfloat16)
        compiled = torch.compile(lambda x: turnout.route(x, GEMMA4, contract, impl=impl), backend="aot_eager")  # noqa: B023
        assert_bitwise_equal(compiled(logits), turnout.route(logits, GEMMA4, contract, impl=impl))


def test_a_row_does_not_depend_on_its_batch_vllm_57016(impl, device):
    """31: the result of a row changed with the size of its batch; more of this in test_invariance.py."""
    logits = make_logits("quantised", 40, 60, device=device)
    spec = turnout.RouterSpec(num_experts=60, top_k=6)
    whole = turnout.route(logits, spec, INT64, impl=impl)
    for row in (0, 17, 39):
        alone = turnout.route(logits[row : row + 1], spec, INT64, impl=impl)
        assert_bitwise_equal(alone, turnout.Routing(*(t[row : row + 1] for t in whole[:2])))


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ids_are_those_of_the_exact_logits_sglang_26588(logits_dtype, impl, device):
    """32: a fused bfloat16 router chose other experts than the float32 one, and accuracy fell."""
    logits = make_logits("normal", 16, 128, logits_dtype, device)
    got = turnout.route(logits, GEMMA4, INT64, impl=impl)
    widened = turnout.route(logits.float(), GEMMA4, INT64, impl=impl)
    assert_bitwise_equal(got, widened)


def test_flat_index_beyond_two_to_the_31_vllm_xpu_kernels_269():
    """33: row * size overflowed 32 bits. 2^31 logits, of which only the last rows are ever touched.

    Here for the CPU; the kernel's addresses are judged in test_portability.py, and run in test_on_gpu.py.
    """
    num_experts, num_tokens = 128, 2**31 // 128 + 2
    logits = torch.empty(num_tokens, num_experts, dtype=torch.bfloat16)
    tail = make_logits("normal", 2, num_experts, torch.bfloat16)
    logits[-2:] = tail
    far_apart = logits[:: num_tokens - 1]  # two rows, 2^31 + 128 logits from one to the other
    far_apart[0] = tail[0]
    assert far_apart.stride(0) > 2**31
    for impl in ("reference", "cpu"):
        got = turnout.route(far_apart, GEMMA4, INT64, impl=impl)
        assert_bitwise_equal(got, turnout.route(tail, GEMMA4, INT64, impl=impl))


def test_a_new_dtype_needs_no_compilation_on_a_cpu_exl3_204():
    """34: a dtype first met under graph capture made the kernel compile there. On a CPU one build serves all."""
    from turnout.routing._cpu_kernel import route_rows

    logits = make_logits("normal", 2, 16)
    spec = turnout.RouterSpec(num_experts=16, top_k=2)
    for ids_dtype in IDS_DTYPES:
        for weights_dtype in WEIGHTS_DTYPES:
            contract = turnout.Contract(ids_dtype=ids_dtype, weights_dtype=weights_dtype)
            for logits_dtype in (torch.float32, torch.bfloat16, torch.float16):
                turnout.route(logits.to(logits_dtype), spec, contract, impl="cpu")
    assert len(route_rows.signatures) == 1


@pytest.mark.gpu
def test_every_dtype_captures_after_one_call_exl3_204(gpu):
    """34, as reported: one call with a contract warms it up; its capture then compiles nothing."""
    logits = make_logits("normal", 2, 128, device=gpu)
    for ids_dtype in IDS_DTYPES:
        contract = turnout.Contract(ids_dtype=ids_dtype)
        want = turnout.route(logits, GEMMA4, contract)
        graph = torch.cuda.CUDAGraph()
        out = poisoned_out(2, 8, contract, gpu)
        with torch.cuda.graph(graph):
            routing = turnout.route(logits, GEMMA4, contract, out=out.tensors)
        graph.replay()
        assert_bitwise_equal(routing, want)


@pytest.mark.parametrize(
    ("field", "tensor"),
    [
        pytest.param("tid2eid", torch.zeros(8, 4, dtype=torch.int64), id="9_hash_table_vllm_40862"),
        pytest.param("input_ids", torch.zeros(2, dtype=torch.int64), id="14_token_ids_vllm_50844"),
        pytest.param("logical_to_physical_map", torch.zeros(16, 2, dtype=torch.int64), id="18_eplb_sglang_25285"),
        pytest.param("logical_replica_count", torch.ones(16, dtype=torch.int64), id="18_replicas_sglang_25285"),
        pytest.param("expert_load", torch.zeros(16, dtype=torch.int32), id="19_expert_load_vllm_38128"),
        pytest.param("record_load", torch.tensor(True), id="19_record_load_vllm_38128"),
        pytest.param("num_counted_tokens", torch.tensor([1], dtype=torch.int32), id="19_counted_tokens_vllm_38128"),
        pytest.param("e_score_correction_bias", torch.zeros(16), id="24_biased_selection_vllm_47367"),
    ],
)
def test_inputs_that_neither_spec_nor_contract_names_are_refused_by_name(field, tensor, impl, device):
    """9, 14, 18, 19: tables that went unchecked, maps applied twice, loads that counted padding."""
    spec = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
    inputs = turnout.RoutingInputs(**{field: tensor.to(device)})
    with pytest.raises(ValueError, match=rf"RoutingInputs\.{field} is given"):
        turnout.route(make_logits("normal", 2, 16, device=device), spec, INT64, inputs, impl=impl)


@pytest.mark.parametrize(
    ("values", "id_space", "missing"),
    [
        pytest.param({"hash_routing": True}, "logical", "input_ids", id="9_14_hash_routing_vllm_43425"),
        pytest.param(
            {"e_score_correction_bias": True, "scoring_func": "sigmoid"}, "logical", "e_score_correction_bias",
            id="24_biased_selection_vllm_47367",
        ),
        pytest.param({}, "physical", "logical_to_physical_map", id="18_eplb_sglang_25285"),
    ],
)  # fmt: skip
def test_inputs_that_spec_or_contract_names_must_be_given(values, id_space, missing, impl, device):
    """9, 14, 18, 24: what a spec asks for is done or refused, never left out."""
    spec = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True, **values)
    contract = turnout.Contract(ids_dtype=torch.int64, id_space=id_space)
    with pytest.raises(ValueError, match=rf"RoutingInputs\.{missing} is missing"):
        turnout.route(make_logits("normal", 2, 16, device=device), spec, contract, impl=impl)


@pytest.mark.parametrize("field", ["tid2eid", "forced_ids", "expert_load", "replay_ids"])
def test_inputs_of_another_shape_or_dtype_are_refused_by_name_vllm_40862(field, impl, device):
    """9, 19: tables and loads that went unchecked."""
    spec = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True, hash_routing=field == "tid2eid")
    id_space = "physical" if field == "expert_load" else "logical"
    fitting = {}
    if field == "tid2eid":
        fitting = {"input_ids": torch.zeros(2, dtype=torch.int64)}
    elif field == "expert_load":
        replicas, count = torch.arange(16)[:, None].contiguous(), torch.ones(16, dtype=torch.int64)
        fitting = {"logical_to_physical_map": replicas, "logical_replica_count": count}
    given = {name: tensor.to(device) for name, tensor in {**fitting, field: torch.zeros(2, 5)}.items()}
    contract = turnout.Contract(ids_dtype=torch.int64, id_space=id_space)
    logits = make_logits("normal", 2, 16, device=device)
    with pytest.raises(ValueError, match=rf"{field} must be"):
        turnout.route(logits, spec, contract, turnout.RoutingInputs(**given), impl=impl)


@pytest.mark.parametrize("values", [{"renormalize_order": 2.0}, {"num_shared_columns": 2}], ids=str)
def test_routers_that_are_not_there_yet_are_refused_by_name(values, impl, device):
    """What a spec asks for is done or refused, never left out."""
    spec = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True, **values)
    with pytest.raises(NotImplementedError, match=rf"RouterSpec\.{next(iter(values))}"):
        turnout.route(make_logits("normal", 2, 16, device=device), spec, INT64, impl=impl)


def test_structures_of_physical_ids_are_refused_by_name(impl, device):
    spec = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
    contract = turnout.Contract(id_space="physical", structures=("tokens_per_expert",))
    with pytest.raises(NotImplementedError, match=r"structures of physical ids.*Contract\.structures"):
        turnout.route(make_logits("normal", 2, 16, device=device), spec, contract, impl=impl)


def test_replay_ids_beside_structures_are_refused_by_name(impl, device):
    spec = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
    contract = turnout.Contract(structures=("tokens_per_expert",))
    inputs = turnout.RoutingInputs(replay_ids=torch.zeros(2, 4, dtype=torch.int16, device=device))
    with pytest.raises(NotImplementedError, match=r"replay_ids beside structures"):
        turnout.route(make_logits("normal", 2, 16, device=device), spec, contract, inputs, impl=impl)
