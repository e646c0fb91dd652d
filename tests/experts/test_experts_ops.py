"""The operators under torch's tools: opcheck, the compiler, export, fake tensors, the profiler."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

import turnout
from turnout.experts.api import choose_impl, contract_of
from turnout.testing.experts import SPECS, ExpertsCase

CASE = ExpertsCase(num_tokens=5)
GPT_OSS = ExpertsCase(num_tokens=3, spec="gpt_oss", ids_dtype=torch.int64, weights_dtype=torch.bfloat16)


def operator_arguments(inputs, impl, structures=()):
    spec = inputs.spec.key
    return inputs.hidden_states, *inputs.weights, *inputs.routing[:2], list(structures), spec, impl, False


@pytest.mark.parametrize("case", [CASE, GPT_OSS, ExpertsCase(num_tokens=0)], ids=str)
def test_opcheck_of_experts(case, impl, device):
    torch.library.opcheck(torch.ops.turnout.experts.default, operator_arguments(case.make(device), impl))


def test_opcheck_of_experts_with_structures(impl, device):
    inputs = CASE.make(device)
    routing = turnout.Routing(*inputs.routing[:2], tokens_per_expert=torch.ones(6, dtype=torch.int32, device=device))
    arguments = operator_arguments(inputs, impl, routing[2:])
    torch.library.opcheck(torch.ops.turnout.experts.default, arguments)


def test_opcheck_of_experts_out(impl, device):
    inputs = CASE.make(device)
    out = {"out": torch.empty_like(inputs.hidden_states)}
    torch.library.opcheck(torch.ops.turnout.experts_out.default, operator_arguments(inputs, impl), out)


def test_cold_fullgraph_compile_with_any_number_of_tokens(impl, device):
    """One graph without a break serves every T (if it does not begin with T = K); results are eager's, to the bit."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def layer(inputs):
        return turnout.experts(*inputs, impl=impl)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (5, 3, 9):
        inputs = ExpertsCase(num_tokens=num_tokens).make(device)
        assert torch.equal(compiled(inputs.arguments), layer(inputs.arguments))
    assert counter.frame_count == 1


def test_fullgraph_compile_into_a_buffer(impl, device):
    torch._dynamo.reset()
    inputs = CASE.make(device)
    out = torch.full_like(inputs.hidden_states, float("nan"))
    compiled = torch.compile(turnout.experts, fullgraph=True, backend="aot_eager")
    compiled(*inputs.arguments, impl=impl, out=out)
    assert torch.equal(out, turnout.experts(*inputs.arguments, impl=impl))


def test_cold_compile_by_inductor_in_a_fresh_process(kernel_device):
    """The default backend, the implementation that ``auto`` chooses, nothing imported or called before."""
    script = f"""
        import torch, turnout
        torch.manual_seed(0)
        x, up, down = (torch.randn(shape, device="{kernel_device}") for shape in ((3, 16), (4, 24, 16), (4, 16, 12)))
        ids = torch.tensor([[0, 1], [3, 1], [2, 0]], dtype=torch.int32, device="{kernel_device}")
        routing, spec = turnout.Routing(torch.ones(ids.shape, device="{kernel_device}"), ids), turnout.ExpertsSpec()
        weights = turnout.ExpertsWeights(up, down)
        compiled = torch.compile(lambda x: turnout.experts(x, weights, routing, spec), fullgraph=True)(x)
        assert torch.equal(compiled, turnout.experts(x, weights, routing, spec))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_export_is_read_by_another_process(tmp_path):
    """The spec travels in the graph: a process that never made it runs it."""

    class Layer(torch.nn.Module):
        def forward(self, hidden_states, weights, topk_weights, topk_ids):
            weights, routing = turnout.ExpertsWeights(*weights), turnout.Routing(topk_weights, topk_ids)
            return turnout.experts(hidden_states, weights, routing, SPECS["gpt_oss"], impl="cpu")

    inputs = GPT_OSS.make()
    arguments = (inputs.hidden_states, tuple(inputs.weights[:4]), *inputs.routing[:2])
    torch.export.save(torch.export.export(Layer(), arguments), tmp_path / "layer.pt2")
    torch.save(arguments, tmp_path / "arguments.pt")
    script = f"""
        import torch, turnout.experts.ops
        run = torch.export.load(r"{tmp_path / "layer.pt2"}").module()
        torch.save(run(*torch.load(r"{tmp_path / "arguments.pt"}")), r"{tmp_path / "result.pt"}")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "result.pt"), turnout.experts(*inputs.arguments, impl="cpu"))


def test_shape_and_dtype_without_data(impl):
    """On ``meta`` and with fake tensors an operator says what it would give."""
    case = ExpertsCase(num_tokens=7, dtype=torch.bfloat16)
    inputs, mode = CASE.make(), FakeTensorMode()
    fake_arguments = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs.arguments)
    with mode:
        fake = turnout.experts(*fake_arguments, impl=impl)
    assert (fake.shape, fake.dtype) == ((5, 40), torch.float32)
    out = turnout.experts(*case.make("meta").arguments, impl=impl)
    assert (out.shape, out.dtype, out.device.type, out.stride()) == ((7, 40), torch.bfloat16, "meta", (40, 1))


@pytest.mark.parametrize(
    ("device_type", "num_tokens", "batch_invariant", "impl"),
    [
        ("cpu", 1, False, "cpu"),
        ("cpu", 4096, True, "cpu"),
        ("cuda", 1, False, "triton"),
        ("cuda", 4096, False, "grouped"),
        ("cuda", 1, True, "grouped"),
        ("cuda", 4096, True, "grouped"),
        ("mps", 16, False, "reference"),
    ],
)
def test_auto_chooses_by_device_and_size_and_says_why(device_type, num_tokens, batch_invariant, impl):
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden_states = torch.empty(num_tokens, 64, device=device_type)
        choice = choose_impl(hidden_states, 8, 128, batch_invariant)
    assert choice.impl == impl
    assert choice.reason


@pytest.mark.parametrize("num_slots", [1, 128, 4096, 10**6])
def test_each_implementation_has_a_contract_without_a_cast(num_slots, impl):
    contract = contract_of(impl, num_slots, 128)
    assert contract.ids_dtype == torch.int32
    assert contract.weights_dtype == torch.float32
    assert contract.sentinel == -1
    assert bool(contract.structures) == (impl == "grouped")


def test_inference_mode(impl, device):
    inputs = CASE.make(device)
    with torch.inference_mode():
        inside = turnout.experts(*inputs.arguments, impl=impl)
    assert torch.equal(inside, turnout.experts(*inputs.arguments, impl=impl))


def test_parameters_that_require_grad_are_read_without_it(impl, device):
    inputs = CASE.make(device)
    weights = turnout.ExpertsWeights(*(None if w is None else torch.nn.Parameter(w) for w in inputs.weights))
    with torch.no_grad():
        out = turnout.experts(inputs.hidden_states, weights, inputs.routing, inputs.spec, impl=impl)
    assert torch.equal(out, turnout.experts(*inputs.arguments, impl=impl))
    assert not out.requires_grad
