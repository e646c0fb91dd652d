"""The recorder: identity by storage and version, module names, source lines, and no tensor kept alive."""

from __future__ import annotations

import gc
import inspect
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from turnout.audit import audit
from turnout.audit.graph import Graph
from turnout.audit.recorder import Recorder


def record(fn, *args, root=None) -> Graph:
    recorder = Recorder(root)
    recorder.run("call", fn, *args)
    return recorder.graph


def by_packet(graph: Graph, packet: str):
    return [op for op in graph if op.packet == f"aten.{packet}"]


class TestIdentity:
    def test_views_detached_tensors_and_data_are_one_storage(self) -> None:
        def program(x):
            y = x * 2
            y.exp(), y.view(-1).sin(), y.detach()[1:].cos(), y.data.t().neg()

        graph = record(program, torch.ones(2, 3))
        storages = {op.reads[0].storage for name in ("exp", "sin", "cos", "neg") for op in by_packet(graph, name)}
        assert len(storages) == 1

    def test_each_write_makes_a_version_and_only_a_full_one_an_epoch(self) -> None:
        def program(x):
            y = x * 2
            y.exp()
            y[0].add_(1)
            y.exp()
            y.zero_()
            y.exp()

        reads = [op.reads[0] for op in by_packet(record(program, torch.ones(2, 3)), "exp")]
        assert [view.version for view in reads] == [1, 2, 3]
        assert [view.epoch for view in reads] == [1, 1, 2]

    def test_out_arguments_and_filled_buffers_are_written_and_not_read(self) -> None:
        def program(x):
            y = torch.empty_like(x)
            torch.mul(x, 2, out=y)
            y.copy_(x)

        graph = record(program, torch.ones(3))
        y = by_packet(graph, "mul")[0].writes[0].storage
        assert [access.op for access in graph.writes_to(y)] == [0, 1, 2]
        assert not graph.reads_of(y)

    def test_an_address_used_again_is_not_the_same_storage(self) -> None:
        def program(x):
            for _ in range(5):
                (x + 1).exp()  # freed at once, so the allocator hands the same memory out again

        graph = record(program, torch.ones(1000))
        assert len({op.reads[0].storage for op in by_packet(graph, "exp")}) == 5

    def test_lists_of_tensors_are_operands_too(self) -> None:
        graph = record(lambda x: torch.cat([x + 1, x + 2]), torch.ones(3))
        assert len(by_packet(graph, "cat")[0].reads) == 2

    def test_a_sparse_tensor_has_an_identity_as_well(self) -> None:
        graph = record(lambda x: x.to_sparse().to_dense().exp(), torch.eye(3))
        assert by_packet(graph, "exp")

    def test_inference_tensors_which_count_no_versions_do(self) -> None:
        def program():
            with torch.inference_mode():
                y = torch.ones(3) * 2
                y.add_(1)
                return y.exp()

        assert by_packet(record(program), "exp")[0].reads[0].version == 2

    def test_composite_operators_come_apart_in_inference_mode_as_they_do_outside(self) -> None:
        def program(x):
            return nn.functional.linear(x.t().contiguous().reshape(2, -1), x.view(2, -1)).to(torch.float64)

        names = []
        for mode in (nullcontext, torch.inference_mode):
            with mode():
                names.append([op.name for op in record(program, torch.ones(2, 3))])
        assert names[0] == names[1]
        assert {"aten.mm.default", "aten.clone.default", "aten._to_copy.default"} <= set(names[0])


class TestWhere:
    def test_operators_carry_module_path_and_line(self) -> None:
        class Inner(nn.Module):
            def forward(self, x):
                return x.float()

        model = nn.Sequential(nn.Sequential(Inner()))
        (op,) = record(model, torch.ones(3, dtype=torch.bfloat16), root=model).ops
        assert op.module == "0.0"
        assert op.source.file == __file__
        assert op.source.function == "forward"
        assert op.source.line == inspect.getsourcelines(Inner.forward)[1] + 1

    def test_a_module_that_the_target_does_not_own_goes_by_its_class(self) -> None:
        linear = nn.Linear(3, 3)
        graph = record(lambda x: linear(x), torch.ones(2, 3))
        assert {op.module for op in graph} == {"Linear"}

    def test_the_stack_survives_a_module_that_raises(self) -> None:
        class Bad(nn.Module):
            def forward(self, x):
                raise RuntimeError("half-way")

        bad = Bad()

        def program(x):
            with pytest.raises(RuntimeError):
                bad(x)
            return x + 1

        assert record(program, torch.ones(3)).ops[-1].module == ""

    def test_hooks_are_gone_afterwards(self) -> None:
        from torch.nn.modules import module

        before = len(module._global_forward_hooks), len(module._global_forward_pre_hooks)
        record(nn.Linear(3, 3), torch.ones(2, 3))
        assert (len(module._global_forward_hooks), len(module._global_forward_pre_hooks)) == before


class TestMemory:
    def test_no_tensor_is_kept_alive(self) -> None:
        seen: list[weakref.ref] = []

        def program(x):
            for _ in range(4):
                x = (x + 1).clone()
                gc.collect()
                assert sum(ref() is not None for ref in seen) <= 1
                seen.append(weakref.ref(x.untyped_storage()))
            return None

        recorder = Recorder()
        recorder.run("call", program, torch.ones(1000))
        assert not any(ref() is not None for ref in seen)

    def test_modules_made_and_dropped_by_the_program_are_freed(self) -> None:
        weights: list[weakref.ref] = []

        def program(x):
            for _ in range(5):
                linear = nn.Linear(3, 3)
                weights.append(weakref.ref(linear.weight))
                linear(x)
                del linear
                gc.collect()
                assert not any(ref() is not None for ref in weights)

        with torch.no_grad():
            record(program, torch.ones(2, 3))
        assert len(weights) == 5

    def test_freed_memory_is_returned_while_recording(self) -> None:
        """A loop that needs 40 MB at a time may not need 4 GB under the recorder."""
        resource = pytest.importorskip("resource")

        def program():
            for _ in range(100):
                torch.ones(10_000_000).add_(1)

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record(program)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
        assert grown < 400_000

    def test_what_the_caller_keeps_is_known_and_what_died_is_known(self) -> None:
        cache = []

        def program(x):
            y = x + 1
            cache.append(x + 2)
            return y.exp()

        graph = record(program, torch.ones(3))
        lives = [graph.storages[op.writes[0].storage].outlives_its_call for op in graph]
        assert lives == [False, True, True]  # y, cached, returned


class TestTrouble:
    def test_a_program_that_raises_half_way_is_reported_up_to_there(self) -> None:
        def program(x):
            (x * 2).clone().exp()
            raise RuntimeError("half-way")

        report = audit(program, torch.ones(3))
        assert report.error == "RuntimeError: half-way"
        assert report.redundant_count() == 1

    def test_an_interrupt_is_not_swallowed(self) -> None:
        def program():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            audit(program)

    def test_something_that_cannot_be_called_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"wants a callable or a torch\.nn\.Module, got Tensor"):
            audit(torch.ones(3))

    def test_keywords_of_the_program_reach_it_whatever_their_names(self) -> None:
        def program(x, regions=(), device_time=""):
            return (regions, device_time, (x * 2).clone())

        seen = []
        report = audit(lambda x, **given: seen.append(program(x, **given)[:2]), torch.ones(3), regions=["a"],
                       device_time="nope")  # fmt: skip
        assert seen == [(["a"], "nope")]
        assert not report.error
        assert report.regions == {}

    def test_a_program_without_torch_says_that_nothing_was_seen(self) -> None:
        assert "No PyTorch operator ran" in audit(lambda: 1).notes[0]

    def test_an_opaque_operator_is_named_as_a_blind_spot(self) -> None:
        from gallery import F32, pr_40565

        assert any("turnout_gallery::topk_int32" in note for note in audit(pr_40565, F32).notes)

    def test_compiled_code_is_said_to_run_uncompiled(self) -> None:
        from gallery import F32, compiled_inside

        assert any("torch.compile" in note for note in audit(compiled_inside, F32).notes)
