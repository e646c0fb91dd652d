"""Bad input: a sentence that says what was given and what is wanted, and a buffer left as it was."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import turnout
from turnout.testing.experts import ExpertsCase
from turnout.testing.inputs import poisoned_buffer

CASE = ExpertsCase(num_tokens=3, num_experts=6, top_k=2, hidden_size=40, intermediate_size=24)


def refused(error, match, inputs, impl, device, **options):
    """Assert that experts raises ``error``, saying ``match``, and writes nothing."""
    out = poisoned_buffer((3, 40), torch.float32, device, 0xFF)
    with pytest.raises(error, match=match):
        turnout.experts(*inputs.arguments, impl=impl, **{"out": out.tensor, **options})
    assert out.is_untouched()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        pytest.param(lambda x: x[0], ValueError, r"must be \[T, H\], got shape \[40\]; flatten", id="rank_1"),
        pytest.param(lambda x: x[None], ValueError, r"got shape \[1, 3, 40\]; flatten.*view", id="rank_3"),
        pytest.param(lambda x: x.int(), ValueError, "float32, bfloat16 or float16, got torch.int32", id="integers"),
        pytest.param(lambda x: x.double(), ValueError, "or float16, got torch.float64", id="float64"),
        pytest.param(lambda x: x.tile(1, 2)[:, ::2], ValueError, "must have contiguous rows", id="columns_apart"),
        pytest.param(lambda x: x.t().contiguous().t(), ValueError, r"strides \(1, 3\); rows may", id="transposed"),
        pytest.param(lambda x: x.requires_grad_(), ValueError, "requires grad.*inference only", id="requires_grad"),
        pytest.param(lambda x: x.tolist(), TypeError, "hidden_states must be a tensor, got list", id="a_list"),
        pytest.param(
            lambda x: x.bfloat16(), ValueError, "gate_up_proj must be .* of torch.bfloat16, got", id="another_dtype"
        ),
        pytest.param(
            lambda x: x[:, :39].contiguous(),
            ValueError,
            r"must be \[6, 48, 39\] of .*, got \[6, 48, 40\]",
            id="narrower",
        ),
        pytest.param(lambda x: x[:2], ValueError, r"topk_ids must be \[2, 2\] of .*, got \[3, 2\]", id="fewer_tokens"),
    ],
)
def test_hidden_states(change, error, match, impl, device):
    inputs = CASE.make(device)
    refused(error, match, dataclasses.replace(inputs, hidden_states=change(inputs.hidden_states)), impl, device)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        pytest.param(
            lambda w: tuple(w), TypeError, "weights must be a turnout.ExpertsWeights, got tuple", id="a_tuple"
        ),
        pytest.param(
            lambda w: w._replace(gate_up_proj=w.gate_up_proj[:5]),
            ValueError,
            r"gate_up_proj must be \[6, 48, 40\] of torch.float32, got \[5, 48, 40\]",
            id="experts_differ",
        ),
        pytest.param(
            lambda w: w._replace(gate_up_proj=w.gate_up_proj[:, :24].contiguous()),
            ValueError,
            r"gate_up_proj must be \[6, 48, 40\] of torch.float32, got \[6, 24, 40\]",
            id="no_up",
        ),
        pytest.param(
            lambda w: w._replace(down_proj=w.down_proj[0]), ValueError, r"three dimensions.*\[40, 24\]", id="one_expert"
        ),
        pytest.param(
            lambda w: w._replace(down_proj=w.down_proj.half()),
            ValueError,
            r"down_proj must be .* of torch.float32, got .* of torch.float16",
            id="dtypes_differ",
        ),
        pytest.param(
            lambda w: w._replace(down_proj=w.down_proj.transpose(1, 2).contiguous().transpose(1, 2)),
            ValueError,
            r"down_proj must be contiguous, got strides \(960, 1, 40\)",
            id="strided",
        ),
        pytest.param(
            lambda w: w._replace(down_bias=torch.zeros(6, 40)),
            ValueError,
            "bias=False, but ExpertsWeights.down_bias is given",
            id="bias_not_named",
        ),
        pytest.param(
            lambda w: w._replace(down_scale=torch.zeros(6, 40, 1)),
            ValueError,
            "quantization='none', but ExpertsWeights.down_scale is given",
            id="scale_not_named",
        ),
        pytest.param(
            lambda w: w._replace(gate_up_proj=torch.nn.Parameter(w.gate_up_proj)),
            ValueError,
            "gate_up_proj requires grad.*no_grad",
            id="requires_grad",
        ),
        pytest.param(
            lambda w: w._replace(gate_up_proj=None), TypeError, "gate_up_proj must be a tensor, got NoneType", id="none"
        ),
    ],
)
def test_weights(change, error, match, impl, device):
    inputs = CASE.make(device)
    refused(error, match, dataclasses.replace(inputs, weights=change(inputs.weights)), impl, device)


def test_biases(impl, device):
    inputs = dataclasses.replace(CASE, spec="gelu").make(device)
    missing = dataclasses.replace(inputs, weights=inputs.weights._replace(gate_up_bias=None))
    refused(ValueError, "bias=True, but ExpertsWeights.gate_up_bias is missing", missing, impl, device)
    longer = dataclasses.replace(
        inputs, weights=inputs.weights._replace(gate_up_bias=torch.zeros(6, 50, device=device))
    )
    refused(ValueError, r"gate_up_bias must be \[6, 48\] .* got \[6, 50\]", longer, impl, device)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        pytest.param(lambda r: tuple(r[:2]), TypeError, "routing must be a turnout.Routing, got tuple", id="a_tuple"),
        pytest.param(
            lambda r: r._replace(topk_ids=r.topk_ids.float()), ValueError, "topk_ids .* got .*float32", id="float_ids"
        ),
        pytest.param(
            lambda r: r._replace(topk_ids=r.topk_ids.to(torch.int8)),
            ValueError,
            "topk_ids .* got .*int8",
            id="int8_ids",
        ),
        pytest.param(
            lambda r: r._replace(topk_ids=r.topk_ids.t().contiguous().t()),
            ValueError,
            r"topk_ids must be contiguous, got strides \(1, 3\)",
            id="strided_ids",
        ),
        pytest.param(
            lambda r: r._replace(topk_weights=r.topk_weights[:, :1].contiguous()),
            ValueError,
            r"topk_weights must be \[3, 2\] of .*, got \[3, 1\]",
            id="top_k_differs",
        ),
        pytest.param(
            lambda r: r._replace(topk_weights=r.topk_weights.double()),
            ValueError,
            "got .*float64",
            id="float64_weights",
        ),
        pytest.param(
            lambda r: r._replace(topk_ids=r.topk_ids.flatten()),
            ValueError,
            r"topk_ids must be \[3, any\] of .*, got \[6\]",
            id="flat_ids",
        ),
        pytest.param(
            lambda r: r._replace(expert_offsets=r.topk_ids.new_zeros(6)),
            ValueError,
            r"expert_offsets must be \[7\] of .*, got \[6\]",
            id="offsets_of_other_experts",
        ),
        pytest.param(
            lambda r: r._replace(inv_permuted_idx=r.topk_ids.short()),
            ValueError,
            "inv_permuted_idx must be .* of torch.int32 or torch.int64, got .*int16",
            id="short_structures",
        ),
    ],
)
def test_routing(change, error, match, impl, device):
    inputs = CASE.make(device)
    refused(error, match, dataclasses.replace(inputs, routing=change(inputs.routing)), impl, device)


@pytest.mark.parametrize(
    ("out", "error", "match"),
    [
        (lambda x: torch.empty(3, 39, device=x.device), ValueError, r"out must be \[3, 40\] of .*, got \[3, 39\]"),
        (lambda x: torch.empty(3, 40, device=x.device).half(), ValueError, "out must be .*, got .*float16"),
        (lambda x: torch.empty(3, 80, device=x.device)[:, ::2], ValueError, "out must be contiguous"),
        (lambda x: [0.0], TypeError, "out must be a tensor, got list"),
        (lambda x: x, ValueError, "out overlaps hidden_states"),
        (lambda x: torch.empty(3, 40, device="meta"), ValueError, "out is on meta, hidden_states on"),
    ],
)
def test_out(out, error, match, impl, device):
    inputs = CASE.make(device)
    before = inputs.hidden_states.clone()
    with pytest.raises(error, match=match):
        turnout.experts(*inputs.arguments, impl=impl, out=out(inputs.hidden_states))
    assert torch.equal(inputs.hidden_states, before)


def test_out_within_the_memory_of_hidden_states(impl, device):
    memory = torch.zeros(5, 40, device=device)
    inputs = dataclasses.replace(CASE.make(device), hidden_states=memory[:3])
    with pytest.raises(ValueError, match="out overlaps hidden_states"):
        turnout.experts(*inputs.arguments, impl=impl, out=memory[2:])


def test_impl_and_spec(device):
    inputs = CASE.make(device)
    refused(ValueError, "impl must be one of auto, reference, cpu, .*; got 'cuda'", inputs, "cuda", device)
    with pytest.raises(TypeError, match=r"spec must be a turnout\.ExpertsSpec, got str"):
        turnout.experts(*inputs.arguments[:3], "silu")


def test_more_slots_than_int32_counts(impl):
    inputs = CASE.make("meta")
    routing = turnout.Routing(
        torch.empty(2**28, 8, device="meta"), torch.empty(2**28, 8, dtype=torch.int32, device="meta")
    )
    hidden_states = torch.empty(2**28, 40, device="meta")
    with pytest.raises(ValueError, match=r"\[268435456, 8\] makes more than 2147483647 slots.*fewer tokens at a time"):
        turnout.experts(hidden_states, inputs.weights, routing, inputs.spec, impl=impl)


def test_cpu_implementation_elsewhere(gpu):
    with pytest.raises(ValueError, match=r"impl='cpu' needs hidden_states on a CPU, got cuda.*use impl='triton'"):
        turnout.experts(*CASE.make(gpu).arguments, impl="cpu")


@pytest.mark.parametrize("impl", ["triton", "grouped"])
def test_kernels_on_a_cpu_without_the_interpreter(impl):
    pytest.importorskip("triton", reason="triton is not installed")
    script = f"""
        import turnout
        from turnout.testing.experts import ExpertsCase
        turnout.experts(*ExpertsCase(num_tokens=2).make().arguments, impl="{impl}")
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert f"ValueError: impl='{impl}' needs tokens on a GPU, got a CPU tensor; use impl='cpu'" in run.stderr


@pytest.mark.parametrize("sizes", [{"num_experts": 0}, {"intermediate_size": 0}], ids=str)
def test_experts_of_no_size(sizes, impl, device):
    numbers = {"num_experts": 6, "intermediate_size": 24} | sizes
    gate_up = torch.zeros(numbers["num_experts"], 2 * numbers["intermediate_size"], 40, device=device)
    down = torch.zeros(numbers["num_experts"], 40, numbers["intermediate_size"], device=device)
    inputs = dataclasses.replace(CASE.make(device), weights=turnout.ExpertsWeights(gate_up, down))
    refused(ValueError, "down_proj must hold an expert, and columns to sum over", inputs, impl, device)


def test_no_choice_at_all(impl, device):
    routing = turnout.Routing(torch.zeros(3, 0, device=device), torch.zeros(3, 0, dtype=torch.int32, device=device))
    inputs = dataclasses.replace(CASE.make(device), routing=routing)
    refused(ValueError, r"topk_ids must be \[T, K\] with K of at least 1", inputs, impl, device)
