"""Fixtures of the permutation tests: every behaviour is asked of each implementation, for few slots and for many."""

import pytest
import torch

import turnout
from turnout.permutation import ops
from turnout.testing.permutation import PoisonedAllocation, assert_permutation_matches


@pytest.fixture(params=["reference", "cpu", "triton", "triton_in_two_launches"])
def variant(request):
    """An implementation; the second launches of Triton's, which many slots need, are tested with few, too."""
    if request.param.startswith("triton"):
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


@pytest.fixture
def impl(variant, monkeypatch):
    if variant == "triton_in_two_launches":
        from turnout.permutation import triton as kernels

        def share_out(num_slots, num_experts):
            tiles = -(-num_slots // 64)
            run = 128 if tiles > 3 else 64  # a program with two tiles, the last perhaps with one
            return kernels.Shares(max(1, -(-num_slots // run)), run, 64, 2)

        monkeypatch.setattr(kernels, "MAX_SLOTS_OF_ONE_LAUNCH", 0)
        monkeypatch.setattr(kernels, "share_out", share_out)
    return variant.split("_")[0]


@pytest.fixture
def device(impl, kernel_device):
    return torch.device("cpu") if impl == "cpu" else kernel_device


@pytest.fixture
def poisoned(monkeypatch):
    """Lets operators write structures into poisoned buffers; the list of what was given to them."""
    given, allocate = [], ops.allocate

    def poisoned_allocate(*arguments):
        given.append(PoisonedAllocation.like(allocate(*arguments)))
        return given[-1].tensors

    monkeypatch.setattr(ops, "allocate", poisoned_allocate)
    return given


@pytest.fixture
def permuted(impl, poisoned):
    """``turnout.permute`` into poisoned buffers between guards, checked against the oracle."""

    def permute(topk_ids, num_experts, contract):
        weights = None
        if "permuted_weights" in contract.structures:
            count = topk_ids.numel()
            weights = torch.arange(1, count + 1, device=topk_ids.device).to(contract.weights_dtype)
            weights = weights.view(topk_ids.shape)
        for _ in range(1 if topk_ids.is_cpu else 2):  # the second call finds the kernels compiled
            permutation = turnout.permute(topk_ids, num_experts, contract, topk_weights=weights, impl=impl)
            assert all(buffer.guards_hold() for buffer in poisoned[-1].buffers), "written outside a buffer"
            assert_permutation_matches(permutation, topk_ids, num_experts, contract, weights)
        return permutation

    return permute
