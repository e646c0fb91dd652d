"""What quantised numbers are: packing, rounding, and the kernels' arithmetic on bits, against torch's own."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from quantized_cases import quantized_rows

import turnout
from turnout.experts import quantization

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from turnout.device.quantized import e4m3_of, half_of_e4m3, load_int4, round_to_integer  # noqa: E402
from turnout.experts import _triton_quantized as kernels  # noqa: E402

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EACH_KIND = pytest.mark.parametrize("kind", [INT8, FLOAT8], ids=["int8", "float8"])


def awkward_rows(dtype, columns=72):
    """Rows of any size: zeros, subnormals, the largest; ties; a largest magnitude that is negative."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(24, columns, generator=rng)
    rows[1] = 0
    rows[2] *= 1e-7
    rows[3] *= 1e-30
    rows[4] *= 1e4
    rows[5] = rows[5].abs()
    rows[6] = -rows[6].abs()
    rows[7] = torch.arange(columns) - 127.5 + 72
    rows[8, 1:] = 0
    rows[9] = torch.finfo(dtype).tiny * torch.arange(columns) / 7
    rows[10] = -0.0
    return rows.to(dtype)


@EACH_KIND
@EACH_DTYPE
def test_rows_are_quantised_as_the_rule_says(dtype, kind):
    rows = awkward_rows(dtype)
    numbers, scale = quantization.quantize_activations(rows, kind)
    assert scale.dtype == dtype
    assert torch.equal(numbers.double() * scale.double(), quantized_rows(rows, "int8" if kind == INT8 else "float8"))


@EACH_KIND
@EACH_DTYPE
def test_the_kernel_quantises_to_the_same_bits(dtype, kind, kernel_device):
    rows = awkward_rows(dtype)
    spec = turnout.ExpertsSpec(quantization="w8a8_int8" if kind == INT8 else "w8a8_fp8")
    wanted, wanted_scale = quantization.quantize_activations(rows, kind)
    wide = torch.cat((rows, rows), dim=1).to(kernel_device)
    for view in (wide[:, : rows.shape[1]], wide[:, rows.shape[1] :].contiguous()):  # rows that lie apart, too
        numbers, scale = kernels._quantize(view, spec, widen=False)
        assert numbers.dtype == kind
        assert torch.equal(scale.cpu(), wanted_scale[:, 0].float())
        assert torch.equal(numbers.view(torch.uint8).cpu(), wanted.view(torch.uint8))


@EACH_KIND
def test_a_row_that_is_not_finite_has_such_a_scale(kind, kernel_device):
    rows = torch.ones(3, 40, device=kernel_device)
    rows[0, 7], rows[1, 7] = float("nan"), float("-inf")
    spec = turnout.ExpertsSpec(quantization="w8a8_int8" if kind == INT8 else "w8a8_fp8")
    _, scale = kernels._quantize(rows, spec, widen=False)
    assert scale[0].isnan()
    assert scale[1].isinf()
    assert scale[2] == (torch.tensor(1.0) / (127.5 if kind == INT8 else 448))


@triton.jit
def _convert(bits_ptr, values_ptr, half_ptr, e4m3_ptr, integer_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(half_ptr + i, half_of_e4m3(tl.load(bits_ptr + i)))
    values = tl.load(values_ptr + i)
    tl.store(e4m3_ptr + i, e4m3_of(values))
    tl.store(integer_ptr + i, round_to_integer(values))


def converted(bits, values, device):
    half, e4m3 = torch.empty(len(bits), dtype=torch.float16), torch.empty(len(bits), dtype=torch.uint8)
    tensors = [tensor.to(device) for tensor in (bits, values, half, e4m3, torch.empty_like(values))]
    block = min(4096, len(bits))
    _convert[(len(bits) // block,)](*tensors, block)
    return [tensor.cpu() for tensor in tensors[2:]]


def test_all_numbers_of_float8_are_widened(kernel_device):
    bits = torch.arange(256, dtype=torch.uint8)
    half, _, _ = converted(bits, torch.zeros(256), kernel_device)
    assert torch.equal(half.nan_to_num(-1), bits.view(FLOAT8).half().nan_to_num(-1))
    assert torch.equal(half.isnan(), bits.view(FLOAT8).float().isnan())


def test_float8_is_rounded_as_torch_rounds(kernel_device):
    """All values of bfloat16 in range, the ties between any two numbers of float8, and NaN."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    numbers = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat((values[(values.abs() <= 448) | values.isnan()], ties, -ties, numbers, -numbers))
    values = torch.nn.functional.pad(values, (0, 2**16 - len(values)))
    _, e4m3, integer = converted(torch.zeros(2**16, dtype=torch.uint8), values, kernel_device)
    is_number = ~values.isnan()
    assert torch.equal(e4m3[is_number], values.to(FLOAT8).view(torch.uint8)[is_number])
    assert e4m3.view(FLOAT8).float()[~is_number].isnan().all()
    assert torch.equal(integer[is_number], values.round()[is_number])


@triton.jit
def _unpack(words_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    word_ptrs = words_ptr + rows * (2 * COLUMNS // 8)
    values = load_int4(word_ptrs, rows < ROWS, COLUMNS, COLUMNS)  # the second half of each row
    tl.store(out_ptr + rows[:, None] * COLUMNS + columns[None, :], values)


@hypothesis.given(st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=5)
def test_int4_is_packed_lowest_first(kernel_device, seed):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (16, 64), generator=rng).to(torch.int8)
    words = quantization.pack_int4(values)
    assert words.dtype == torch.int32
    assert words.shape == (16, 8)
    for j in range(8):
        assert torch.equal(((words >> (4 * j)) & 15) - 8, values[:, j::8].int())
    assert torch.equal(quantization.unpack_int4(words), values)
    out = torch.empty(16, 32, dtype=torch.int32, device=kernel_device)
    _unpack[(1,)](words.to(kernel_device), out, 16, 32)
    assert torch.equal(out.cpu(), values[:, 32:].int())


@pytest.mark.parametrize(
    ("quantization_name", "group_size", "bytes_of_a_weight"),
    [("w4a16", 32, 0.5), ("w4a8_int8", 64, 0.5), ("w8a8_int8", None, 1), ("w8a8_fp8", None, 1)],
)
def test_forms_of_the_schemes(quantization_name, group_size, bytes_of_a_weight):
    """Quantised weights take what their bits say, and lie near the plain ones."""
    spec = turnout.ExpertsSpec(quantization=quantization_name, group_size=group_size)
    plain = turnout.ExpertsWeights(torch.randn(3, 128, 192), torch.randn(3, 192, 64))
    weights = quantization.quantize_weights(plain, spec)
    empty = quantization.empty_weights(3, 192, 64, spec, scale_dtype=torch.float32, device="cpu")
    for name in ("gate_up_proj", "down_proj", "gate_up_scale", "down_scale"):
        tensor, other = getattr(weights, name), getattr(empty, name)
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
    assert weights.gate_up_proj.nbytes == bytes_of_a_weight * plain.gate_up_proj.numel()
    values = quantization.dequantized(weights.gate_up_proj, weights.gate_up_scale, spec)
    step = weights.gate_up_scale.repeat_interleave(192 // weights.gate_up_scale.shape[-1], dim=-1)
    widest = 32 if quantization_name == "w8a8_fp8" else 1  # steps of float8 are 32 near its end
    assert ((values - plain.gate_up_proj).abs() <= 0.5001 * widest * step).all()
    quantization.check_weights(torch.empty(0, 192), weights, spec)
