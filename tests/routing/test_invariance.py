"""A row's routing depends on that row alone: not on the batch, the run, the tile, the threads or the memory layout."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

import turnout
from turnout.testing.checks import assert_bitwise_equal, assert_matches_oracle
from turnout.testing.inputs import every_kind_of_row, make_logits

SPEC = turnout.RouterSpec(num_experts=60, top_k=6, per_expert_scale=True, routed_scaling_factor=2.5)
CONTRACT = turnout.Contract(ids_dtype=torch.int64)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def scaled(device):
    return turnout.RoutingInputs(per_expert_scale=torch.linspace(0.25, 2, 60, dtype=torch.bfloat16, device=device))


def rows_of(routing, start, end):
    return turnout.Routing(routing.topk_weights[start:end], routing.topk_ids[start:end])


@EACH_DTYPE
def test_a_row_is_bitwise_the_same_in_any_batch(dtype, impl, device):
    rows = every_kind_of_row(60, dtype, device)
    # In the interpreter 80 rows span several programs; otherwise the batch spans threads and tile choices.
    interpreted = impl == "triton" and device.type == "cpu"
    others = make_logits("normal", 80 if interpreted else 4096, 60, dtype, device)
    whole = turnout.route(torch.cat([others, rows]), SPEC, CONTRACT, scaled(device), impl=impl)
    for i in range(len(rows)):
        alone = turnout.route(rows[i : i + 1], SPEC, CONTRACT, scaled(device), impl=impl)
        assert_bitwise_equal(alone, rows_of(whole, len(others) + i, len(others) + i + 1))


@EACH_DTYPE
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "as_they_are"])
def test_a_row_is_bitwise_the_same_in_any_tile(renormalize, dtype, kernel_device, monkeypatch):
    kernels = pytest.importorskip("turnout.routing.triton", reason="triton is not installed")
    spec = turnout.RouterSpec(num_experts=60, top_k=6, renormalize=renormalize)
    logits = every_kind_of_row(60, dtype, kernel_device)
    results = []
    for rows, num_warps in ((1, 1), (4, 1), (16, 1), (32, 4)):
        tile = kernels.Tile(rows, num_warps)
        monkeypatch.setattr(kernels, "choose_tile", lambda *_, tile=tile: tile)
        results.append(turnout.route(logits, spec, CONTRACT, impl="triton"))
        assert_bitwise_equal(results[0], results[-1])


@EACH_DTYPE
def test_a_second_run_is_bitwise_the_same(dtype, impl, device):
    logits = every_kind_of_row(60, dtype, device)
    runs = [turnout.route(logits, SPEC, CONTRACT, scaled(device), impl=impl) for _ in range(3)]
    assert_bitwise_equal(runs[0], runs[1])
    assert_bitwise_equal(runs[0], runs[2])


def test_implementations_choose_the_same_ids(impl, device):
    logits = every_kind_of_row(60, torch.bfloat16, device, rows=2)
    got = turnout.route(logits, SPEC, CONTRACT, scaled(device), impl=impl)
    reference = turnout.route(logits, SPEC, CONTRACT, scaled(device), impl="reference")
    assert torch.equal(got.topk_ids, reference.topk_ids)


def test_no_tokens(impl, device):
    routing = turnout.route(torch.empty(0, 60, device=device), SPEC, CONTRACT, scaled(device), impl=impl)
    assert routing.topk_weights.shape == routing.topk_ids.shape == (0, 6)
    assert (routing.topk_weights.dtype, routing.topk_ids.dtype) == (torch.float32, torch.int64)


@EACH_DTYPE
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: torch.cat([x, x.flip(1)], dim=1)[:, :60], id="rows_apart"),
        pytest.param(lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1:61], id="unaligned_rows_apart"),
        pytest.param(lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(-1, 60), id="unaligned"),
        pytest.param(lambda x: x.repeat_interleave(2, dim=0)[::2], id="every_second_row"),
        pytest.param(lambda x: x[3:4].expand(9, 60), id="one_row_expanded"),
        pytest.param(lambda x: x[3:4].as_strided((1, 60), (7, 1), x[3:4].storage_offset()), id="odd_stride_of_one_row"),
    ],
)
def test_memory_layout_of_the_logits_does_not_matter(layout, dtype, device, routed):
    logits = layout(make_logits("normal", 16, 60, dtype, device))
    strided = routed(logits, SPEC, CONTRACT, scaled(device))
    assert_bitwise_equal(
        strided, routed(logits.clone(memory_format=torch.contiguous_format), SPEC, CONTRACT, scaled(device))
    )


def test_unaligned_buffers(impl, device):
    """Buffers that start anywhere: the alignment that a kernel was compiled for is not taken for granted."""
    logits = make_logits("normal", 5, 60, device=device)
    want = turnout.route(logits, SPEC, CONTRACT, scaled(device), impl=impl)
    out = (
        torch.empty(31, device=device)[1:].view(5, 6),
        torch.empty(31, dtype=torch.int64, device=device)[1:].view(5, 6),
    )
    assert_bitwise_equal(turnout.route(logits, SPEC, CONTRACT, scaled(device), out=out, impl=impl), want)


def test_one_expert_has_no_columns_to_stride(device, routed):
    """E = 1: the stride of a dimension of size 1 says nothing, and is not refused."""
    spec = turnout.RouterSpec(num_experts=1, top_k=1)
    routed(torch.arange(12.0, device=device).view(4, 3)[:, 1:2].as_strided((4, 1), (3, 3), 1), spec, CONTRACT)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_of_the_cpu_do_not_matter(threads, monkeypatch):
    from turnout.routing import cpu

    logits = every_kind_of_row(60, rows=3)
    want = turnout.route(logits, SPEC, CONTRACT, scaled("cpu"), impl="cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu, "LOGITS_PER_THREAD", 60)
    submitted, pool = [], turnout.threads._pool()
    monkeypatch.setattr(turnout.threads, "_pool", lambda: submitted.append(1) or pool)
    assert_bitwise_equal(turnout.route(logits, SPEC, CONTRACT, scaled("cpu"), impl="cpu"), want)
    assert len(submitted) == threads - 1, "each share but the caller's own"
    assert_matches_oracle(want, logits, SPEC, CONTRACT, scaled("cpu"))


def test_calls_of_many_sizes_start_no_more_threads_than_processors():
    """A pool for each number of shares would start 36 threads here."""
    for threads in range(2, 10):
        turnout.threads.in_threads(lambda start, end: time.sleep(0.001), threads, threads)
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("turnout")]) <= os.cpu_count()


def test_threads_survive_a_fork():
    """A forked child has none of its parent's threads: a pool made before the fork would wait for ever."""
    script = """
        import os, sys, torch, turnout
        from turnout.routing import cpu
        torch.set_num_threads(2)
        cpu.LOGITS_PER_THREAD = 16
        spec, contract = turnout.RouterSpec(num_experts=16, top_k=2), turnout.Contract()
        logits = torch.zeros(64, 16)
        turnout.route(logits, spec, contract, impl="cpu")
        child = os.fork()
        if child == 0:
            turnout.route(logits, spec, contract, impl="cpu")
            os._exit(0)
        sys.exit(os.waitpid(child, 0)[1])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)
