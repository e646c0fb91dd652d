"""Kernels that are kept after their first launch serve those calls alone that Triton would serve with them."""

import types

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from turnout.device import launch


class Kernel:
    """Stands in for a kernel and, once compiled, for that: notes which of both each launch went through."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def run(*arguments, num_warps):
            self.launches.append("looked up")
            return {grid: lambda *addresses, stream: self.launches.append("kept")}

        return run


def small(dtype=torch.float32, offset=0):
    return torch.zeros(64, dtype=dtype)[offset:]


@pytest.fixture
def launched(monkeypatch):
    """Launch once with the arguments of a first call, then with one of them changed; how the second went."""
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_compiles_by_size", lambda: False)
    monkeypatch.setattr(launch, "current_stream", lambda device: 0)

    def run(**changed):
        kernel, first = Kernel(), {"tensors": (small(), None), "numbers": (5, 6), "constants": (8,), "num_warps": 4}
        for given in (first, first | changed):
            launch.launch_kernel(kernel, (1, 1, 1), **given)
        return kernel.launches

    return run


@pytest.mark.parametrize(
    "same",
    [{}, {"numbers": (1, 16)}, {"tensors": (torch.zeros(4096), None)}],
    ids=["everything", "other_numbers", "another_size"],
)
def test_a_kept_kernel_is_launched(same, launched):
    assert launched(**same) == ["looked up", "kept"]


@pytest.mark.parametrize(
    "other",
    [
        {"tensors": (small(torch.int32), None)},
        {"tensors": (small(), small())},
        {"tensors": (small(offset=1), None)},
        {"tensors": (torch.zeros(64, device="meta"), None)},
        {"numbers": (2**31, 6)},
        {"numbers": (5, 2**31)},
        {"constants": (16,)},
        {"num_warps": 8},
    ],
    ids=["dtype", "present", "alignment", "device", "first_number", "second_number", "constant", "warps"],
)
def test_what_triton_specialises_on_is_looked_up(other, launched):
    assert launched(**other) == ["looked up", "looked up"]


def test_numbers_past_32_bits_are_kept_apart(monkeypatch):
    """A kernel compiled for the one to be wide is none for the other."""
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_compiles_by_size", lambda: False)
    monkeypatch.setattr(launch, "current_stream", lambda device: 0)
    kernel = Kernel()
    for numbers in ((2**31, 6), (5, 2**31), (2**32, 7)):
        launch.launch_kernel(kernel, (1, 1, 1), (small(),), numbers, (), 4)
    assert kernel.launches == ["looked up", "looked up", "kept"]


@pytest.mark.parametrize("by_size", [True, False])
def test_storages_past_2_gib_where_triton_compiles_by_size(by_size, monkeypatch):
    """As it does for AMD's GPUs: a kernel kept for less takes offsets of 32 bits, one for more is not kept."""
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_compiles_by_size", lambda: by_size)
    monkeypatch.setattr(launch, "current_stream", lambda device: 0)
    less, more = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (2**31 - 1, 2**31))
    kernel = Kernel()
    for tensor in (more, less, more, less, more[:16]):  # the last: few elements of a large storage
        launch.launch_kernel(kernel, (1, 1, 1), (tensor, None), (), (), 4)
    looked_up, kept = "looked up", "kept"
    by_other = [looked_up, looked_up, looked_up, kept, looked_up]
    assert kernel.launches == (by_other if by_size else [looked_up, kept, kept, kept, kept])


@pytest.mark.parametrize(("backend", "by_size"), [("cuda", False), ("hip", True)])
def test_triton_says_for_what_it_compiles(backend, by_size, monkeypatch):
    target = types.SimpleNamespace(backend=backend)
    driver = types.SimpleNamespace(active=types.SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    assert launch._compiles_by_size.__wrapped__() is by_size
