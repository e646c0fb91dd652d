"""The operators under torch's tools, and what they refuse."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from remap_cases import bits, make_ids, make_map, make_rows, poisoned_remapped
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

import turnout
from turnout.remap.api import Remapped, choose_impl, remap_hidden_states, remapped_experts

SPEC = turnout.ExpertsSpec(bias=True)
OPS = torch.ops.turnout


def make_weights(num_experts, hidden, intermediate, device="cpu", dtype=torch.float32, bias=True):
    rng = torch.Generator().manual_seed(3)
    shapes = [(2 * intermediate, hidden), (hidden, intermediate), (2 * intermediate,), (hidden,)][: 4 if bias else 2]
    drawn = (torch.randn(num_experts, *shape, generator=rng) / shape[-1] ** 0.5 for shape in shapes)
    return turnout.ExpertsWeights(*(tensor.to(dtype).to(device) for tensor in drawn))


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_opcheck_of_remap(num_tokens, impl, device):
    ids, expert_map = make_ids("uniform", num_tokens, 3, 9, device=device), make_map(9, 4, device)
    rows = make_rows(num_tokens, 8, torch.bfloat16, device)
    scales = make_rows(num_tokens, 2, torch.float32, device)
    torch.library.opcheck(OPS.remap.default, (rows, ids, 4, impl, expert_map, None))
    torch.library.opcheck(OPS.remap.default, (rows, ids, 9, impl, None, scales))


@pytest.mark.parametrize("with_scales", [False, True])
def test_opcheck_of_remap_out(with_scales, impl, device):
    ids, rows = make_ids("uniform", 5, 3, 9, device=device), make_rows(5, 8, torch.bfloat16, device)
    scales = make_rows(5, 2, torch.float32, device) if with_scales else None
    buffers = [None if buffer is None else buffer.tensor for buffer in poisoned_remapped(rows, ids, 9, scales)]
    names = ("rows", "tokens_per_expert", "inv_permuted_idx", "scales")
    arguments = (rows, ids, 9, impl, None, scales)
    torch.library.opcheck(OPS.remap_out.default, arguments, dict(zip(names, buffers, strict=True)))


@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_opcheck_of_remapped_experts(num_rows, impl, device):
    counts = torch.tensor([num_rows // 3, 0, num_rows - num_rows // 3], dtype=torch.int32, device=device)
    rows = torch.randn(num_rows, 8, generator=torch.Generator().manual_seed(0)).to(device)
    arguments = (rows, counts, SPEC.key, impl, *make_weights(3, 8, 6, device)[:4])
    torch.library.opcheck(OPS.remapped_experts.default, arguments)


def test_cold_fullgraph_compile_with_any_number_of_tokens(impl, device):
    """One graph without a break serves every T; results are eager's, to the bit."""
    torch._dynamo.reset()
    counter, weights, expert_map = CompileCounter(), make_weights(4, 8, 6, device), make_map(9, 4, device)

    def layer(hidden_states, topk_ids):
        remapped = remap_hidden_states(hidden_states * 2, topk_ids, 4, expert_map=expert_map, impl=impl)
        outputs = remapped_experts(remapped.hidden_states, remapped.tokens_per_expert, weights, SPEC, impl=impl)
        shares = torch.ones(topk_ids.shape, device=topk_ids.device)
        return turnout.combine(outputs, shares, remapped.inv_permuted_idx, impl=impl), *remapped[:3]

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (2, 3, 9):
        hidden_states = torch.linspace(-1, 1, num_tokens * 8, device=device).view(num_tokens, 8)
        ids = make_ids("uniform", num_tokens, 3, 9, device=device)
        for got, want in zip(compiled(hidden_states, ids), layer(hidden_states, ids), strict=True):
            assert (bits(got) == bits(want)).all()
    assert counter.frame_count == 1


def test_cold_compile_by_inductor_in_a_fresh_process(kernel_device):
    """The default backend, the implementation that ``auto`` chooses, into buffers; nothing called before."""
    script = f"""
        import torch
        from turnout.integrations.vllm_xpu_kernels import remap_hidden_states
        rows, ids = torch.arange(40.0, device="{kernel_device}").view(5, 8), torch.arange(10).view(5, 2) % 3
        def remap(rows, ids):
            out = rows.new_empty(10, 8), ids.new_empty(3, dtype=torch.int32), ids.new_empty(5, 2, dtype=torch.int32)
            remap_hidden_states(rows, None, out[0], None, None, out[1], out[2], ids, 3, 3)
            return out
        ids = ids.to("{kernel_device}")
        for a, b in zip(torch.compile(remap, fullgraph=True)(rows, ids), remap(rows, ids)):
            assert torch.equal(a, b), (a, b)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_shapes_and_dtypes_without_data(ids_dtype, impl):
    """On ``meta`` and with fake tensors an operator says what it would give."""
    for device in ("meta", "cpu"):
        with FakeTensorMode() if device == "cpu" else torch.device("meta"):
            rows = torch.empty(7, 16, dtype=torch.bfloat16, device=device)
            ids = torch.empty(7, 3, dtype=ids_dtype, device=device)
            scales = torch.empty(7, 2, device=device)
            result = remap_hidden_states(rows, ids, 5, hidden_states_scales=scales, impl=impl)
            weights = turnout.ExpertsWeights(rows.new_empty(5, 8, 16), rows.new_empty(5, 16, 4))
            plain = turnout.ExpertsSpec()
            outputs = remapped_experts(result.hidden_states, result.tokens_per_expert, weights, plain, impl=impl)
        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in (*result, outputs)]
        assert shapes == [
            ((21, 16), torch.bfloat16), ((5,), torch.int32), ((7, 3), torch.int32), ((21, 2), torch.float32),
            ((21, 16), torch.bfloat16),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("device_type", "num_experts", "impl"),
    [("cpu", 2000, "cpu"), ("cuda", 1024, "triton"), ("cuda", 1025, "reference"), ("mps", 8, "reference")],
)
def test_auto_chooses_by_device_and_size_and_says_why(device_type, num_experts, impl):
    with FakeTensorMode(allow_non_fake_inputs=True):
        choice = choose_impl(torch.empty(2, 4, device=device_type), num_experts)
    assert choice.impl == impl
    assert choice.reason


def arguments(device, **changed):
    given = {
        "hidden_states": make_rows(3, 8, torch.bfloat16, device),
        "topk_ids": make_ids("uniform", 3, 2, 6, device=device),
        "num_experts": 4,
        "expert_map": make_map(6, 4, device),
        "hidden_states_scales": make_rows(3, 2, torch.float32, device),
    }
    return given | {name: change(given[name]) for name, change in changed.items()}


REFUSED = [
    ("hidden_states", lambda x: x.tolist(), TypeError, "hidden_states must be a tensor, got list"),
    ("hidden_states", lambda x: x[0], ValueError, r"must be \[T, columns\] of torch.float32 or .*, got \[8\]"),
    ("hidden_states", lambda x: x.double(), ValueError, r"got \[3, 8\] of torch.float64"),
    (
        "hidden_states",
        lambda x: x.tile(1, 2)[:, ::2],
        ValueError,
        "must have contiguous rows, got strides .*if the copy",
    ),
    ("hidden_states", lambda x: x.float().requires_grad_(), ValueError, "requires grad.*inference only.*no_grad"),
    (
        "topk_ids",
        lambda x: x.short(),
        ValueError,
        r"topk_ids must be \[3, any\] of torch.int32 or torch.int64, got .*16",
    ),
    ("topk_ids", lambda x: x[:2], ValueError, r"topk_ids must be \[3, any\] of .*, got \[2, 2\]"),
    ("topk_ids", lambda x: x[:, :0], ValueError, "K at least 1, got K = 0"),
    ("topk_ids", lambda x: x.t().contiguous().t(), ValueError, r"topk_ids must be contiguous, got strides \(1, 3\)"),
    ("num_experts", lambda _: 0, ValueError, "num_experts must be an int of at least 1, got 0"),
    ("num_experts", lambda _: 4.0, ValueError, "num_experts must be an int of at least 1, got 4.0"),
    (
        "expert_map",
        lambda x: x.long(),
        ValueError,
        r"expert_map must be \[any\] of torch.int32, got \[6\] of torch.int64",
    ),
    ("expert_map", lambda x: x.tile(2)[::2], ValueError, r"expert_map must be contiguous, got strides \(2,\)"),
    ("expert_map", lambda x: x[:0], ValueError, "expert_map must have an entry for each expert of all ranks, got none"),
    ("hidden_states_scales", lambda x: x[:2], ValueError, "hidden_states_scales has 2 rows .* hidden_states 3"),
    ("hidden_states_scales", lambda x: x.half(), ValueError, "hidden_states_scales must be .*, got .* torch.float16"),
    ("hidden_states_scales", lambda x: x.t().contiguous().t(), ValueError, "scales must have contiguous rows"),
]


@pytest.mark.parametrize(
    ("name", "change", "error", "match"), REFUSED, ids=[f"{case[0]}_{i}" for i, case in enumerate(REFUSED)]
)
def test_refusals(name, change, error, match, impl, device):
    """A sentence that says what was given and what is wanted, and buffers left as they were."""
    right = arguments(device)
    buffers = poisoned_remapped(right["hidden_states"], right["topk_ids"], 4, right["hidden_states_scales"])
    out = Remapped(*(buffer.tensor for buffer in buffers))
    with pytest.raises(error, match=match):
        remap_hidden_states(**arguments(device, **{name: change}), out=out, impl=impl)
    assert all(buffer.is_untouched() for buffer in buffers)


@pytest.mark.parametrize(
    ("field", "change", "error", "match"),
    [
        (
            "hidden_states",
            lambda x: x[:5],
            ValueError,
            r"out.hidden_states must be \[6, 8\] of torch.bfloat16, got \[5, 8",
        ),
        ("hidden_states", lambda x: x.half(), ValueError, "got .* of torch.float16"),
        ("tokens_per_expert", lambda x: x.long(), ValueError, r"out.tokens_per_expert must be \[4\] of torch.int32"),
        ("inv_permuted_idx", lambda x: x.flatten(), ValueError, r"must be \[3, 2\] of torch.int32, got \[6\]"),
        ("scales", lambda _: None, ValueError, "scales is given, but out.scales is missing; both or neither"),
        ("scales", lambda x: x[:, :1], ValueError, r"out.scales must be \[6, 2\] of torch.float32, got \[6, 1\]"),
    ],
)
def test_buffers_that_do_not_fit(field, change, error, match, impl, device):
    given = arguments(device)
    out = remap_hidden_states(**given, impl="reference")
    with pytest.raises(error, match=match):
        remap_hidden_states(**given, out=out._replace(**{field: change(getattr(out, field))}), impl=impl)


def test_other_refusals(impl, device):
    given = arguments(device)
    with pytest.raises(TypeError, match="out must be a Remapped, got tuple"):
        remap_hidden_states(**given, out=tuple(remap_hidden_states(**given, impl="reference")), impl=impl)
    with pytest.raises(ValueError, match="impl must be one of auto, reference, triton, cpu; got 'cuda'"):
        remap_hidden_states(**given, impl="cuda")
    without = given | {"hidden_states_scales": None}
    with pytest.raises(ValueError, match=r"scales is missing, but out.scales is given; both or neither"):
        remap_hidden_states(**without, out=remap_hidden_states(**given, impl="reference"), impl=impl)


def test_more_slots_than_positions_can_count(impl):
    with FakeTensorMode():
        rows, ids = torch.empty(2**29, 1), torch.empty(2**29, 4, dtype=torch.int32)
        with pytest.raises(ValueError, match="positions are int32: at most 2147483647 in one call; split the tokens"):
            remap_hidden_states(rows, ids, 4, impl=impl)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rows": torch.zeros(6, 8).double()}, ValueError, r"rows must be \[any, any\] of torch.float32 or .*float64"),
        ({"rows": torch.zeros(6, 16)[:, ::2]}, ValueError, "rows must be contiguous"),
        ({"rows": torch.zeros(6, 7)}, ValueError, r"gate_up_proj must be \[4, 12, 7\]"),
        ({"tokens_per_expert": torch.zeros(3, dtype=torch.int32)}, ValueError, r"tokens_per_expert must be \[4\] of "),
        (
            {"tokens_per_expert": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"torch.int32, got \[4\] of torch.int64",
        ),
        (
            {"spec": turnout.ExpertsSpec()},
            ValueError,
            "the spec has bias=False, but ExpertsWeights.gate_up_bias is given",
        ),
        (
            {"spec": turnout.ExpertsSpec(quantization="w8a8_fp8")},
            NotImplementedError,
            "does not run quantization='w8a8",
        ),
        ({"weights": (1, 2)}, TypeError, "weights must be a turnout.ExpertsWeights, got tuple"),
    ],
)
def test_refusals_of_remapped_experts(change, error, match, impl):
    given = {
        "rows": torch.zeros(6, 8), "tokens_per_expert": torch.zeros(4, dtype=torch.int32),
        "weights": make_weights(4, 8, 6), "spec": SPEC,
    }  # fmt: skip
    with pytest.raises(error, match=match):
        remapped_experts(**given | change, impl=impl)


def test_triton_without_a_gpu_says_what_to_do():
    script = """
        import torch
        from turnout.remap.api import remap_hidden_states
        try:
            remap_hidden_states(torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64), 3, impl="triton")
        except ValueError as error:
            print(error)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (
        "impl='triton' needs tensors on a GPU, got a CPU tensor; use impl='cpu', or set TRITON_INTERPRET=1"
        in run.stdout
    )
