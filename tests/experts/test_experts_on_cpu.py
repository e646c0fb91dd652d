"""What is the CPU implementation's own: who computes which rows, threads, and what it does with memory."""

import subprocess
import sys
import textwrap
import time

import pytest
import torch

import turnout
from turnout.experts import cpu
from turnout.testing.experts import SPECS, ExpertsCase, assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def experts(inputs, **options):
    return turnout.experts(*inputs.arguments, impl="cpu", **options)


@pytest.fixture
def products(monkeypatch):
    """The shapes [rows, K] x [K, N] that torch multiplies."""
    shapes, mm, addmm = [], torch.mm, torch.addmm

    def counted_mm(a, b, **kwargs):
        shapes.append((*a.shape, b.shape[1]))
        return mm(a, b, **kwargs)

    def counted_addmm(bias, a, b, **kwargs):
        shapes.append((*a.shape, b.shape[1]))
        return addmm(bias, a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counted_mm)
    monkeypatch.setattr(torch, "addmm", counted_addmm)
    return shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_rows_through_torch_are_accurate(spec, dtype, products, monkeypatch):
    """Also in 16 bits, which torch takes where the CPU has instructions for them; some experts have few rows."""
    monkeypatch.setattr(cpu, "_has_fast_gemm", lambda dtype: True)
    monkeypatch.setattr(cpu, "FEW_ROWS", 6)
    monkeypatch.setattr(cpu, "FEW_PRODUCTS", 0)
    inputs = ExpertsCase(num_tokens=40, num_experts=9, routing="skewed", spec=spec, dtype=dtype).make()
    counts = inputs.routing.topk_ids.flatten().bincount(minlength=9).tolist()
    assert any(0 < count <= 6 for count in counts), "own kernels have work, too"
    assert_accurate(experts(inputs), inputs)
    assert products == [shape for rows in counts if rows > 6 for shape in ((rows, 40, 48), (rows, 24, 40))]


def test_torch_multiplies_many_rows_of_float32(products):
    inputs = ExpertsCase(num_tokens=64, top_k=1, num_experts=1, hidden_size=256, intermediate_size=128).make()
    assert_accurate(experts(inputs), inputs)
    assert products == [(64, 256, 256), (64, 128, 256)]


def test_small_products_and_16_bits_without_instructions_stay_here(products, monkeypatch):
    monkeypatch.setattr(cpu, "_has_fast_gemm", lambda dtype: dtype == torch.float32)
    experts(ExpertsCase(num_tokens=64).make())
    experts(ExpertsCase(num_tokens=64, top_k=1, num_experts=1, hidden_size=256, dtype=torch.bfloat16).make())
    assert products == []


def test_batch_invariant_runs_never_go_through_torch(products, monkeypatch):
    monkeypatch.setattr(cpu, "FEW_PRODUCTS", 0)
    experts(ExpertsCase(num_tokens=64).make(), batch_invariant=True)
    assert products == []


@pytest.mark.parametrize("through_torch", [False, True])
@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("spec", ["gelu_tanh", "gpt_oss"])
def test_threads_do_not_matter(spec, threads, through_torch, monkeypatch):
    monkeypatch.setattr(cpu, "FEW_PRODUCTS", 0 if through_torch else 1 << 30)
    inputs = ExpertsCase(num_tokens=33, spec=spec).make()
    want = experts(inputs)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu, "PRODUCTS_PER_THREAD", 1)
    assert torch.equal(experts(inputs), want)


def test_threads_survive_a_fork():
    """A forked child has none of its parent's threads: a pool made before the fork would wait for ever."""
    script = """
        import os, sys, torch, turnout
        from turnout.experts import cpu
        from turnout.testing.experts import ExpertsCase
        torch.set_num_threads(2)
        cpu.PRODUCTS_PER_THREAD = 16
        arguments = ExpertsCase(num_tokens=4).make().arguments
        turnout.experts(*arguments, impl="cpu")
        child = os.fork()
        if child == 0:
            turnout.experts(*arguments, impl="cpu")
            os._exit(0)
        sys.exit(os.waitpid(child, 0)[1])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


def test_an_exception_in_a_thread_is_raised():
    from turnout.threads import in_threads

    def fail_late(start, end):
        if start > 0:
            raise RuntimeError(f"from {start} to {end}")

    with pytest.raises(RuntimeError, match="from 2 to 4"):
        in_threads(fail_late, 4, 2)


def test_an_exception_waits_for_the_other_shares():
    """Ctrl-C in the caller's own share: the others still write to buffers that the caller is about to free."""
    from turnout.threads import in_threads

    ended = []

    def interrupted(start, end):
        if start == 0:
            raise KeyboardInterrupt
        time.sleep(0.2)
        ended.append(start)

    with pytest.raises(KeyboardInterrupt):
        in_threads(interrupted, 4, 2)
    assert ended == [2]


@pytest.mark.parametrize(("count", "threads"), [(0, 3), (1, 3), (5, 1), (5, 2), (7, 3), (3, 8)])
def test_shares_make_up_the_whole(count, threads):
    from turnout.threads import in_threads

    seen = []
    in_threads(lambda start, end: seen.extend(range(start, end)), count, threads)
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_written_exactly(dtype):
    """Through an expert that multiplies with 1 and one row at a time; NaN stays NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    out = turnout.combine(numbers[None], torch.ones(1, 1), impl="cpu")[0]
    same = (out == numbers) | (out.isnan() & numbers.isnan())
    assert same.all(), numbers[~same]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_rounded_to_nearest_even(dtype):
    """Halves of neighbours' sums, exactly between two numbers of the dtype, and some that overflow."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**15), 2**15, (2, 4096), generator=generator).to(torch.int16).view(dtype)
    weights = torch.tensor([[0.5, 0.5]])
    out = turnout.combine(numbers[None], weights, impl="cpu")[0]
    want = (numbers.float() * 0.5).sum(0).to(dtype)
    same = (out == want) | (out.isnan() & want.isnan())
    assert same.all(), numbers[:, ~same]


def test_memory_of_a_call_is_small():
    """Beside the weights there is a value for each slot and column in the model's dtype, and none in float32.

    Where torch multiplies 16-bit matrices, the busiest expert's rows and their projection lie there as well.
    """
    case = ExpertsCase(num_tokens=256, top_k=4, hidden_size=512, intermediate_size=64, dtype=torch.bfloat16)
    inputs = case.make()
    experts(inputs)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        experts(inputs)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.events() if event.name.startswith("aten::empty"))
    slots, busiest = 256 * 4, int(inputs.routing.topk_ids.flatten().long().bincount().max())
    scratch = busiest * (512 + 2 * 64) * 2
    assert 0 < allocated <= slots * (512 + 64) * 2 + slots * 5 * 4 + 256 * 512 * 2 + scratch + 1024
