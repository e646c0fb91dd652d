"""Fixtures of the combine tests: every behaviour is asked of each implementation."""

import pytest
import torch

from turnout.combine.api import IMPLS


@pytest.fixture(params=IMPLS)
def impl(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


@pytest.fixture
def device(impl, kernel_device):
    return torch.device("cpu") if impl == "cpu" else kernel_device
