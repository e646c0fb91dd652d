"""Kernels that are kept after their first launch serve those calls alone that Triton would serve with them."""

import types

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton

from turnout.device import launch


class Kernel:
    """Stands in for a kernel: notes whether each launch went through it or through what it had been compiled to."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def run(*arguments, num_warps):
            self.launches.append("looked up")
            return Compiled(run=lambda *given: self.launches.append("kept"))

        return run


class Compiled(triton.compiler.CompiledKernel):
    """A kernel as Triton compiles it, with its own way to the launcher; ``run`` stands in for that."""

    run = None

    def __init__(self, run):
        self.run, self.module, self.function, self.packed_metadata, self.src = run, object(), 17, (4, 1, 0), None
        self.name = "kernel"


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


# What is launched once more


@pytest.fixture
def given():
    """What the launcher is given when a kernel is launched once more; then the same, as Triton itself gives it."""

    def run():
        notes = []
        compiled = Compiled(run=lambda *arguments: notes.append(arguments))
        launch.launch_compiled(compiled, (3, 2, 1), 5, (1024, None, 7))
        compiled[3, 2, 1](1024, None, 7, stream=5)
        return notes

    return run


def test_the_launcher_is_given_what_triton_gives_it_save_hooks_that_call_nothing(given):
    ours, tritons = given()
    assert ours[:6] + ours[9:] == tritons[:6] + tritons[9:] == (3, 2, 1, 5, 17, (4, 1, 0), 1024, None, 7)
    assert ours[6:9] == (None, None, None)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called_as_triton_calls_them(hook, given):
    def profile(metadata):
        pass

    chain = getattr(triton.knobs.runtime, hook)
    chain.add(profile)
    try:
        ours, tritons = given()
    finally:
        chain.remove(profile)
    assert ours[7:9] == tritons[7:9] == (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
    assert ours[6].get() == tritons[6].get() == {"name": "kernel", "function": 17, "stream": 5}
    assert given()[0][6:9] == (None, None, None)


def test_one_function_as_hook_is_called(given, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", print)
    assert given()[0][8] is print


@pytest.mark.parametrize(
    "other",
    [
        lambda kernel, grid: lambda *arguments, stream: kernel.run(grid, stream, kernel.function, *arguments),
        lambda kernel, grid: lambda *arguments, stream: kernel.launch_somehow(grid, stream, *arguments),
    ],
    ids=["other_arguments", "another_launcher"],
)
def test_a_triton_that_does_it_otherwise_does_it_itself(other, monkeypatch):
    class Changed(Compiled):
        __getitem__ = other

        def launch_somehow(self, *arguments):
            notes.append(("somehow", *arguments))

    notes = []
    monkeypatch.setattr(launch, "CompiledKernel", Changed)
    monkeypatch.setattr(launch, "_takes_usual_arguments", launch._takes_usual_arguments.__wrapped__)
    compiled = Changed(run=lambda *arguments: notes.append(arguments))
    launch.launch_compiled(compiled, (3, 2, 1), 5, (1024,))
    compiled[3, 2, 1](1024, stream=5)
    ours, tritons = notes
    assert ours == tritons
