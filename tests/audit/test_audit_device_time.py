"""The profiler's side: what it counts, where it puts it, and what it says that it cannot see."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from turnout.audit.api import audit_calls
from turnout.audit.device_time import measure
from turnout.machine import profiler_activities


@torch.library.custom_op("turnout_timing::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x.float().bfloat16()


class Casting(nn.Module):
    def forward(self, x):
        return x.float()  # alone: on the CPU an operator on mixed dtypes casts inside itself, and that counts too


class Hiding(nn.Module):
    def forward(self, x):
        return opaque(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Casting(), Casting()])
        self.hiding = Hiding()

    def forward(self, x):
        return [layer(x) for layer in self.layers], self.hiding(x)


X = torch.ones(64, 64, dtype=torch.bfloat16)


def test_copies_are_counted_per_call_and_laid_at_the_module_that_makes_them() -> None:
    model = Model()
    times = measure({"forward": [lambda: model(X)] * 3}, model, "cpu")
    (phase,) = times.phases
    assert phase.calls == 3
    assert phase.to_copy_calls == 4  # two in plain sight, two inside the operator
    rows = {(row.module, row.inside): row.calls for row in phase.modules}
    assert rows["layers.*", ""] == 2
    assert rows["hiding", "turnout_timing::opaque"] == 2


def test_share_is_part_of_the_whole() -> None:
    model = Model()
    (phase,) = measure({"forward": [lambda: model(X)]}, model, "cpu").phases
    assert 0 < phase.copy_us < phase.device_us
    assert phase.share == phase.copy_us / phase.device_us


def test_an_audit_can_carry_device_time() -> None:
    report = audit_calls(Model(), X, device_time="cpu")
    assert report.device_time is not None
    assert report.device_time.device == "cpu"
    assert "turnout_timing::opaque" in report.notes[0]


def test_a_device_that_the_profiler_does_not_measure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"measures no device type 'abacus'; give one of: cpu"):
        measure({"forward": []}, None, "abacus")


def test_fused_conversions_of_compiled_code_are_gone_and_said_to_be_out_of_sight() -> None:
    compiled = torch.compile(lambda x: (x.float() * 2).bfloat16())
    compiled(X)
    times = measure({"forward": [lambda: compiled(X)]}, None, "cpu")
    assert times.phases[0].to_copy_calls == 0
    assert any("compiled" in note for note in times.notes)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_accelerators_have_an_activity_of_their_own(device) -> None:
    assert profiler_activities(device)[-1].name == device.upper()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    def test_a_cast_is_one_operator_and_one_kernel(self) -> None:
        model, x = Casting().cuda(), X.cuda()
        model(x)
        (phase,) = measure({"forward": [lambda: model(x)] * 2}, model, "cuda").phases
        assert (phase.copy_calls, phase.copy_kernels) == (1, 1)
        assert 0 < phase.copy_us == phase.device_us

    def test_copies_replayed_from_a_graph_are_found_by_kernel_name_and_said_to_be_so(self) -> None:
        x = X.cuda()
        x.float().mul(2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.float().mul(2)
        times = measure({"forward": [graph.replay]}, None, "cuda")
        assert times.phases[0].copy_calls == 0
        assert times.phases[0].copy_kernels == 1
        assert any("graph launches" in note for note in times.notes)
