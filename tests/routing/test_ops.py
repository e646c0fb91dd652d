"""The operators under torch's tools: opcheck, the compiler, export, fake tensors."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

import turnout
from turnout.contracts import IDS_DTYPES, WEIGHTS_DTYPES
from turnout.routing.api import choose_impl
from turnout.routing.ops import declarations
from turnout.testing.checks import assert_bitwise_equal
from turnout.testing.inputs import make_logits, poisoned_out

SPEC = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True, per_expert_scale=True)
CONTRACT = turnout.Contract(ids_dtype=torch.int64, weights_dtype=torch.bfloat16, sentinel=-1)


def scaled(device, **padding):
    return turnout.RoutingInputs(per_expert_scale=torch.linspace(0.5, 2, 16, device=device), **padding)


def operator_arguments(logits, impl):
    padding = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    scale = torch.ones(16, dtype=torch.bfloat16, device=logits.device)
    return logits, declarations(SPEC, CONTRACT), impl, scale, padding, None, None


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_opcheck_of_route(num_tokens, impl, device):
    arguments = operator_arguments(make_logits("normal", num_tokens, 16, device=device), impl)
    torch.library.opcheck(torch.ops.turnout.route.default, arguments)


def test_opcheck_of_route_out(impl, device):
    arguments = operator_arguments(make_logits("normal", 5, 16, device=device), impl)
    out = poisoned_out(5, 4, CONTRACT, device)
    buffers = {"topk_weights": out.topk_weights.tensor, "topk_ids": out.topk_ids.tensor}
    torch.library.opcheck(torch.ops.turnout.route_out.default, arguments, buffers)


def further_arguments(device, impl, is_forced):
    """Of a router with a bias, or with forced ids, whose experts have two replicas each."""
    spec = turnout.RouterSpec(
        num_experts=16, top_k=4, scoring_func="sigmoid", e_score_correction_bias=True, renormalize=True
    )
    contract = turnout.Contract(id_space="physical", sentinel=-1)
    forced = torch.arange(20, device=device).view(5, 4) % 16 if is_forced else None
    physical, count = torch.arange(32, device=device).view(16, 2), torch.full((16,), 2, device=device)
    bias, logits = torch.linspace(-1, 1, 16, device=device), make_logits("normal", 5, 16, device=device)
    return logits, declarations(spec, contract), impl, None, None, None, None, bias, None, forced, physical, count


@pytest.mark.parametrize("is_forced", [False, True], ids=["selected", "forced"])
def test_opcheck_of_route_with_further_inputs(is_forced, impl, device):
    torch.library.opcheck(torch.ops.turnout.route.default, further_arguments(device, impl, is_forced))


def test_opcheck_of_route_out_with_further_buffers(impl, device):
    """Load and replay buffers are written, and said to be."""
    out = poisoned_out(5, 4, turnout.Contract(), device)
    buffers = {
        "record_load": torch.tensor(True, device=device),
        "num_counted_tokens": torch.tensor([3], dtype=torch.int32, device=device),
        "expert_load": torch.zeros(32, dtype=torch.int32, device=device),
        "replay_ids": torch.zeros(5, 4, dtype=torch.int16, device=device),
        "topk_weights": out.topk_weights.tensor,
        "topk_ids": out.topk_ids.tensor,
    }
    torch.library.opcheck(torch.ops.turnout.route_out.default, further_arguments(device, impl, False), buffers)


def test_cold_fullgraph_compile_with_any_number_of_tokens(impl, device):
    """One graph without a break serves every T; results are eager's, to the bit."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def layer(logits, scale):
        inputs = turnout.RoutingInputs(per_expert_scale=scale)
        return turnout.route(logits * 2, SPEC, CONTRACT, inputs, impl=impl)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    scale = torch.linspace(0.5, 2, 16, device=device)
    for num_tokens in (2, 3, 9):
        logits = make_logits("normal", num_tokens, 16, torch.bfloat16, device)
        assert_bitwise_equal(compiled(logits, scale), layer(logits, scale))
    assert counter.frame_count == 1


def test_fullgraph_compile_into_buffers(impl, device):
    torch._dynamo.reset()
    logits = make_logits("normal", 5, 16, device=device)

    def layer(logits, out):
        return turnout.route(logits, SPEC, CONTRACT, scaled(logits.device), out=out, impl=impl)

    out = poisoned_out(5, 4, CONTRACT, device)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(logits, out.tensors[:2])
    assert_bitwise_equal(out.tensors, turnout.route(logits, SPEC, CONTRACT, scaled(device), impl=impl))


def test_cold_compile_by_inductor_in_a_fresh_process(kernel_device):
    """The default backend, the implementation that ``auto`` chooses, nothing imported or called before."""
    script = f"""
        import torch, turnout
        spec = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
        contract = turnout.Contract(ids_dtype=torch.int16, weights_dtype=torch.bfloat16)
        logits = torch.arange(48.0, device="{kernel_device}").view(3, 16).sin()
        compiled = torch.compile(lambda x: turnout.route(x, spec, contract), fullgraph=True)(logits)
        eager = turnout.route(logits, spec, contract)
        for a, b in zip(compiled[:2], eager[:2]):
            assert a.dtype == b.dtype and torch.equal(a, b), (a, b)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_export_is_read_by_another_process(tmp_path):
    """Spec and contract travel in the graph: a process that never made them runs it."""

    class Layer(torch.nn.Module):
        def forward(self, logits):
            routing = turnout.route(logits, SPEC, CONTRACT, scaled("cpu"), impl="cpu")
            return routing.topk_weights, routing.topk_ids

    logits = make_logits("quantised", 6, 16)
    dynamic = {"logits": {0: torch.export.Dim("num_tokens", min=1)}}
    torch.export.save(torch.export.export(Layer(), (logits,), dynamic_shapes=dynamic), tmp_path / "layer.pt2")
    script = f"""
        import torch, turnout.routing.ops
        run = torch.export.load(r"{tmp_path / "layer.pt2"}").module()
        logits = torch.load(r"{tmp_path / "logits.pt"}")
        torch.save([run(logits), run(logits[:3])], r"{tmp_path / "results.pt"}")
    """
    torch.save(logits, tmp_path / "logits.pt")
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    whole, part = torch.load(tmp_path / "results.pt")
    assert_bitwise_equal(turnout.Routing(*whole), turnout.route(logits, SPEC, CONTRACT, scaled("cpu"), impl="cpu"))
    assert_bitwise_equal(turnout.Routing(*part), turnout.Routing(*(tensor[:3] for tensor in whole)))


@pytest.mark.parametrize("ids_dtype", IDS_DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES, ids=str)
def test_shapes_and_dtypes_without_data(ids_dtype, weights_dtype, impl):
    """On ``meta`` and with fake tensors an operator says what it would give."""
    contract = turnout.Contract(ids_dtype=ids_dtype, weights_dtype=weights_dtype)
    spec = turnout.RouterSpec(num_experts=60, top_k=6)
    with FakeTensorMode():
        fake = turnout.route(torch.empty(7, 60), spec, contract, impl=impl)
    for routing in (fake, turnout.route(torch.empty(7, 60, device="meta"), spec, contract, impl=impl)):
        assert routing.topk_weights.shape == routing.topk_ids.shape == (7, 6)
        assert (routing.topk_weights.dtype, routing.topk_ids.dtype) == (weights_dtype, ids_dtype)
        assert routing.topk_ids.stride() == (6, 1)


def test_a_routing_is_a_pytree_and_unpacks(impl, device):
    routing = turnout.route(make_logits("normal", 2, 16, device=device), SPEC, CONTRACT, scaled(device), impl=impl)
    topk_weights, topk_ids, *structures = routing
    assert topk_weights is routing.topk_weights
    assert topk_ids is routing.topk_ids
    assert structures == [None] * len(structures)
    doubled = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor * 2, routing)
    assert isinstance(doubled, turnout.Routing)
    assert torch.equal(doubled.topk_ids, topk_ids * 2)


@pytest.mark.parametrize(
    ("device_type", "num_experts", "impl"),
    [
        ("cpu", 1025, "cpu"),
        ("cuda", 1024, "triton"),
        ("cuda", 1025, "reference"),
        ("xpu", 16, "triton"),
        ("mps", 16, "reference"),
    ],
)
def test_auto_chooses_by_device_and_size_and_says_why(device_type, num_experts, impl):
    if device_type == "xpu" and torch.cuda.is_available():
        pytest.skip("a torch built for CUDA has no XPU tensors, not even fake ones")
    with FakeTensorMode(allow_non_fake_inputs=True):
        choice = choose_impl(torch.empty(2, num_experts, device=device_type), num_experts)
    assert choice.impl == impl
    assert choice.reason


def test_inference_mode(impl, device):
    logits = make_logits("normal", 3, 16, device=device)
    with torch.inference_mode():
        inside = turnout.route(logits, SPEC, CONTRACT, scaled(device), impl=impl)
    assert_bitwise_equal(inside, turnout.route(logits, SPEC, CONTRACT, scaled(device), impl=impl))
    assert not inside.topk_weights.requires_grad
