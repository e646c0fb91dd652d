"""The operator on quantised weights: refusals, torch's tools, and what it must not do to memory."""

import dataclasses

import pytest
import torch
from allocations import peak_allocation
from quantized_cases import SCHEME_IDS, SCHEMES, Sizes, check_errors, draw
from torch.library import opcheck

import turnout
from turnout.experts import _cpu_quantized
from turnout.experts.quantization import SCHEMES as FORMS
from turnout.experts.quantization import empty_weights

EACH_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=SCHEME_IDS)
W4A16 = SCHEMES[0]


def arguments_of(case, impl):
    return (*case[:1], *case.weights, *case.routing[:2], (), case.spec.key, impl, False)


@EACH_SCHEME
def test_opcheck(scheme):
    case = draw(scheme, 5)
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if scheme[0] != "w8a8_fp8":  # torch's own comparison in this one multiplies float8, which torch cannot
        tests.append("test_schema")
    opcheck(torch.ops.turnout.experts.default, arguments_of(case, "cpu"), test_utils=tests)
    out = torch.empty_like(case.hidden_states)
    opcheck(torch.ops.turnout.experts_out.default, arguments_of(case, "cpu"), {"out": out}, test_utils=tests)


@EACH_SCHEME
def test_compiles_as_one_graph(scheme):
    case = draw(scheme, 5)

    def layer(hidden_states, weights, routing):
        return turnout.experts(hidden_states * 1, weights, routing, case.spec)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case[:3]), turnout.experts(*case))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda c: weights(c, gate_up_scale=None), ValueError, ["quantization='w4a16'", "gate_up_scale is missing"]),
        (lambda c: weights(c, down_bias=torch.zeros(7, 160)), ValueError, ["bias=False", "down_bias is given"]),
        (lambda c: weights(c, down_proj=c.weights.down_proj.float()), ValueError, ["down_proj", "int32", "float32"]),
        (lambda c: weights(c, down_proj=c.weights.down_proj[0]), ValueError, ["down_proj", "three dimensions"]),
        (lambda c: weights(c, down_scale=c.weights.down_scale[:, :, :2]), ValueError, ["[7, 160, 3]", "[7, 160, 2]"]),
        (lambda c: weights(c, down_scale=c.weights.down_scale.double()), ValueError, ["down_scale", "float64"]),
        (lambda c: weights(c, gate_up_proj=[]), TypeError, ["gate_up_proj", "tensor", "list"]),
        (
            lambda c: weights(c, gate_up_proj=c.weights.gate_up_proj.mT.contiguous().mT),
            ValueError,
            ["gate_up_proj must be contiguous"],
        ),
        (lambda c: spec(c, group_size=96), ValueError, ["group_size=96", "hidden size 160", "another group size"]),
        (lambda c: spec(c, group_size=16), ValueError, ["gate_up_scale", "[7, 192, 10]", "[7, 192, 5]"]),
        (lambda c: spec(c, quantization="w8a8_int8", group_size=None), ValueError, ["gate_up_proj", "int8", "int32"]),
        (lambda c: spec(c, transposed=True), NotImplementedError, ["transposed=True", "[E, 2I, H]"]),
        (lambda c: spec(c, interleaved=True), NotImplementedError, ["interleaved=True", "all gate before all up"]),
        (lambda c: spec(c, bias=True), NotImplementedError, ["bias=True", "without bias"]),
        (lambda c: spec(c, quantization="none", group_size=None), ValueError, ["gate_up_proj", "bfloat16", "int32"]),
    ],
)
def test_refusals(change, kind, words):
    with pytest.raises(kind) as refusal:
        turnout.experts(*change(draw(W4A16, 2)))
    assert all(word in str(refusal.value) for word in words), refusal.value


def weights(case, **fields):
    return case._replace(weights=case.weights._replace(**fields))


def spec(case, **fields):
    return case._replace(spec=dataclasses.replace(case.spec, **fields))


@pytest.mark.parametrize("impl", ["triton", "grouped"])
def test_kernels_refuse_groups_that_they_cannot_read(impl, kernel_device):
    case = draw(("w4a16", 8), 2, device=kernel_device)
    with pytest.raises(ValueError, match="multiple of 32 columns, got group_size=8; use impl='reference'"):
        turnout.experts(*case, impl=impl)
    check_errors(case, {"reference": turnout.experts(*case, impl="reference")})


def test_the_cpu_path_reads_groups_of_any_size():
    case = draw(("w4a16", 8), 3)
    check_errors(case, {"cpu": turnout.experts(*case, impl="cpu")})


def test_groups_that_are_no_power_of_two(kernel_device):
    sizes = Sizes(num_experts=3, top_k=1, hidden_size=192, intermediate_size=96)
    case = draw(("w4a16", 96), 2, sizes, dtype=torch.float16, device=kernel_device)
    check_errors(case, {"triton": turnout.experts(*case, impl="triton")})


def test_float8_is_widened_where_it_cannot_be_multiplied(kernel_device, monkeypatch):
    """What sm80 runs, on any device."""
    from turnout.experts import _triton_quantized as kernels

    monkeypatch.setattr(kernels, "multiplies_float8", lambda: False)
    sizes = Sizes(num_experts=3, top_k=1, hidden_size=96, intermediate_size=64)
    case = draw(("w8a8_fp8", None), 3, sizes, dtype=torch.float16, device=kernel_device)
    check_errors(case, {"triton": turnout.experts(*case, impl="triton")})


def large_layer(scheme, device, num_tokens=1):
    """Random bits in the form of a scheme; large, as memory is measured on it."""
    spec = turnout.ExpertsSpec(quantization=scheme[0], group_size=scheme[1])
    made = empty_weights(16, 1024, 512, spec, scale_dtype=torch.bfloat16, device=device)
    stored = FORMS[scheme[0]].weight_dtype
    for weight in (made.gate_up_proj, made.down_proj):
        weight.view(torch.uint8).random_(0, 100 if stored.is_floating_point else 256)  # no NaN
    made.gate_up_scale.fill_(1e-3)
    made.down_scale.fill_(1e-3)
    hidden_states = torch.randn(num_tokens, 1024, device=device).bfloat16()
    ids = torch.arange(4 * num_tokens, device=device).view(num_tokens, 4) % 16
    routing = turnout.Routing(torch.rand(num_tokens, 4, device=device), ids)
    return (hidden_states, made, routing, spec), sum(tensor.nbytes for tensor in made if tensor is not None)


def test_the_measure_of_memory_sees_allocations():
    """Those that are alive together, and not those that came and went."""

    def one_after_the_other():
        for _ in range(3):
            torch.empty(1_000_000)

    assert peak_allocation(one_after_the_other) == 4_000_000
    assert peak_allocation(lambda: [torch.empty(1_000_000) for _ in range(3)]) == 12_000_000


@EACH_SCHEME
def test_a_decode_step_takes_little_beside_the_packed_weights(scheme):
    """No expert is ever dequantised as a whole: a quarter of one in float32 is the most."""
    arguments, packed = large_layer(scheme, "cpu")
    turnout.experts(*arguments, impl="cpu")
    peak = peak_allocation(lambda: turnout.experts(*arguments, impl="cpu"))
    assert 0 < peak < 0.1 * packed
    assert peak < 4 * _cpu_quantized.NUMBERS_AT_A_TIME + 2**17  # the scratch, and rows of activations


@pytest.mark.gpu
@EACH_SCHEME
@pytest.mark.parametrize("impl", ["triton", "grouped"])
def test_a_decode_step_takes_little_memory_on_a_gpu(impl, scheme, gpu):
    arguments, packed = large_layer(scheme, gpu)
    turnout.experts(*arguments, impl=impl)
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    turnout.experts(*arguments, impl=impl)
    assert torch.accelerator.max_memory_allocated() - before < 0.1 * packed


COPIES = {"aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous"}


@EACH_SCHEME
def test_no_copy_of_a_weight_hides_in_the_operator(scheme):
    """Copies that the profiler sees inside are of activations, scales and outputs: none has a weight's form."""
    arguments, _ = large_layer(scheme, "cpu", num_tokens=3)
    made = arguments[1]
    turnout.experts(*arguments, impl="cpu")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, with_stack=False
    ) as profiler:
        turnout.experts(*arguments, impl="cpu")
    columns = {made.gate_up_proj.shape[-1], made.down_proj.shape[-1]}
    if made.gate_up_proj.dtype != torch.int32:
        columns -= {1024, 512}  # activations have as many; their rows are few
    copies = [event for event in profiler.events() if event.name in COPIES]
    for event in copies:
        for shape in event.input_shapes:
            assert len(shape) < 3, (event.name, shape)
            assert not (len(shape) == 2 and shape[-1] in columns), (event.name, shape)
            assert len(shape) < 2 or shape[0] <= 512, (event.name, shape)


@pytest.mark.gpu
@EACH_SCHEME
@pytest.mark.parametrize("impl", ["triton", "grouped"])
def test_launches_on_a_gpu(impl, scheme, gpu):
    """Two GEMMs and the weighted sum; quantisation is a launch of its own, twice; the block map one or two."""
    from turnout.bench.timing import launches

    if gpu.type != "cuda":
        pytest.skip(f"graphs are captured through torch.cuda; this machine has {gpu.type}")
    arguments, _ = large_layer(scheme, gpu)
    most = 3 if scheme[0] == "w4a16" else 5
    assert launches(lambda i: turnout.experts(*arguments, impl=impl)) <= most + (impl == "grouped")


@pytest.mark.parametrize("scheme", [W4A16, SCHEMES[3]], ids=["w4a16", "w8a8_int8"])
def test_the_stride_of_one_row_compiles_nothing_anew(scheme, kernel_device, monkeypatch):
    """Torch lets it be anything: the last of T tokens, cut from them, says T rows."""
    kernels = pytest.importorskip("turnout.experts._triton_quantized", reason="triton is not installed")
    seen, launch = [], kernels.launch_kernel
    monkeypatch.setattr(kernels, "launch_kernel", lambda *given: (seen.append(given[4]), launch(*given)))
    case = draw(scheme, 1, Sizes(4, 2, 64, 32), dtype=torch.float16, device=kernel_device)
    for num_tokens in (1, 5):
        row = case.hidden_states.expand(num_tokens, 64).contiguous()[None][:, -1]
        assert row.stride() == (num_tokens * 64, 1)
        other = case._replace(hidden_states=row)
        check_errors(other, {"triton": turnout.experts(*other, impl="triton")})
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
