"""Scores have the same bits in kernels as in the reference: a selection that ranks them depends on the last."""

import pytest
import torch

from turnout.routing import scores as reference

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

from turnout.device import scores as kernels  # noqa: E402

FUNCTIONS = ("exp", "log1p", "sigmoid", "sqrtsoftplus", "tanh")
SIZE, BLOCK = 1 << 16, 1 << 12


@triton.jit
def apply(x_ptr, y_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if FUNCTION == "exp":
        y = kernels.exp(x)
    elif FUNCTION == "log1p":
        y = kernels.log1p(x)
    elif FUNCTION == "sigmoid":
        y = kernels.sigmoid(x)
    elif FUNCTION == "sqrtsoftplus":
        y = kernels.sqrtsoftplus(x)
    else:
        y = kernels.tanh(x)
    tl.store(y_ptr + offsets, y)


def inputs_of(function):
    """Values as logits have them, any bit pattern that is no NaN, and what is special."""
    generator = torch.Generator().manual_seed(0)
    if function == "log1p":
        return torch.exp(-100 * torch.rand(SIZE, generator=generator) ** 3)
    bits = torch.randint(-(2**31), 2**31, (SIZE,), generator=generator).to(torch.int32)
    x = bits.view(torch.float32).nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf)
    x[: SIZE // 2] = 20 * torch.randn(SIZE // 2, generator=generator)
    x[:9] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 87.0, -87.0, 87.00001, -87.00001, 1e-40])
    return x


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bits_are_those_of_the_reference(function, kernel_device):
    x = inputs_of(function)
    y = torch.full_like(x, torch.nan).to(kernel_device)
    apply[(SIZE // BLOCK,)](x.to(kernel_device), y, function, BLOCK, **kernels.EXACT)
    want = getattr(reference, function)(x)
    if function == "tanh":  # -0.0 or +0.0 for zero is no matter
        y, want = y + 0.0, want + 0.0
    wrong = y.cpu().view(torch.int32) != want.view(torch.int32)
    assert not wrong.any(), f"{int(wrong.sum())} values, the first at {x[wrong][:3].tolist()}"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_are_those_of_float64(function):
    x = inputs_of(function)
    x = x[(x.abs() < 80) & (x.abs() > 1e-30)]
    wide = {
        "exp": torch.exp,
        "log1p": torch.log1p,
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda v: torch.nn.functional.softplus(v, threshold=700).sqrt(),
        "tanh": torch.tanh,
    }
    got, want = getattr(reference, function)(x).double(), wide[function](x.double())
    tolerance = 3e-7 if function == "tanh" else 3e-7 * want.abs()  # tanh: of 1, not of its value
    assert ((got - want).abs() <= tolerance).all()
