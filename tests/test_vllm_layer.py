"""What the plugin of vLLM runs in mode ``layer``, on stand-ins for vLLM's objects: which layers, how many tokens."""

import types

import pytest
import torch

import turnout
from turnout.experts.tuning import are_few
from turnout.integrations import _vllm_gates as gates
from turnout.integrations import _vllm_modes as modes
from turnout.integrations._vllm_experts import LayerExperts
from turnout.router.api import FEW_TOKENS
from turnout.testing.experts import make_weights

E, K, H, INTERMEDIATE = 16, 4, 64, 32


class MoEPrepareAndFinalizeNoDPEPModular:
    pass


class Dispatcher:
    pass


@pytest.fixture(autouse=True)
def restored_mode():
    yield
    modes.force(None)


def runner_of(device="cpu", **changes):
    """vLLM's runner of a layer that turnout's experts can run, but for the changes, by dotted names."""
    spec = turnout.ExpertsSpec(activation="silu")
    weights = make_weights(spec, E, H, INTERMEDIATE, torch.bfloat16)
    kernel = types.SimpleNamespace(prepare_finalize=MoEPrepareAndFinalizeNoDPEPModular())
    method = types.SimpleNamespace(
        moe_kernel=kernel,
        unquantized_backend=types.SimpleNamespace(name="TRITON"),
        moe=types.SimpleNamespace(has_bias=False),
    )
    experts = types.SimpleNamespace(
        quant_method=method, activation=types.SimpleNamespace(value="silu"), global_num_experts=E, expert_map=None,
        apply_router_weight_on_input=False, forward_modular=lambda **given: "vLLM's",
        w13_weight=weights.gate_up_proj.to(device), w2_weight=weights.down_proj.to(device),
    )  # fmt: skip
    runner = types.SimpleNamespace(routed_experts=experts, router=types.SimpleNamespace(eplb_state=None))
    for name, value in changes.items():
        *path, last = name.split("__")
        owner = runner
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return runner


def hindrance_of(runner):
    return LayerExperts(runner, "layer")._find_hindrance(torch.empty(1, H, dtype=torch.bfloat16))


def test_a_plain_layer_has_no_hindrance():
    assert hindrance_of(runner_of()) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"routed_experts__quant_method__unquantized_backend": None}, "backend None: not the plain weights"),
        ({"routed_experts__quant_method__moe_kernel__prepare_finalize": Dispatcher()}, "Dispatcher moves tokens"),
        ({"routed_experts__activation__value": "swigluoai"}, "activation swigluoai is none of silu, gelu, gelu_tanh"),
        ({"routed_experts__expert_map": torch.arange(E)}, "the experts are spread over ranks"),
        ({"router__eplb_state": object()}, "the experts are spread over ranks"),
        ({"_shared_experts": object()}, "shared experts run beside them"),
        ({"routed_experts__apply_router_weight_on_input": True}, "weights on the input, or biases"),
        ({"routed_experts__quant_method__moe__has_bias": True}, "weights on the input, or biases"),
        ({"routed_experts__w13_weight": torch.empty(1)}, "weights of torch.float32, tokens of torch.bfloat16"),
    ],
    ids=lambda value: next(iter(value)).rsplit("__", 1)[-1] if isinstance(value, dict) else "",
)
def test_what_turnout_does_not_compute_stays_vllms_own(changes, reason):
    assert reason in hindrance_of(runner_of(**changes))


@pytest.mark.parametrize("mode", modes.MODES)
def test_tokens_on_a_cpu_are_vllms(mode):
    layer = LayerExperts(runner_of(), mode)
    ids = torch.zeros(1, K, dtype=torch.int32)
    assert layer.forward(torch.ones(1, H, dtype=torch.bfloat16), torch.ones(1, K), ids) == "vLLM's"


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 64])
def test_few_tokens_on_a_gpu_are_turnouts(num_tokens, gpu):
    runner = runner_of(gpu)
    layer, weights = LayerExperts(runner, "layer"), runner.routed_experts
    x = torch.randn(num_tokens, H, device=gpu).bfloat16()
    routing = turnout.Routing(
        torch.rand(num_tokens, K, device=gpu), torch.rand(num_tokens, E, device=gpu).argsort()[:, :K].int()
    )
    out = layer.forward(x, *routing[:2])
    if not are_few(num_tokens, K, E):
        assert out == "vLLM's"
        return
    plain = turnout.ExpertsWeights(weights.w13_weight, weights.w2_weight)
    want = turnout.experts(x, plain, routing, turnout.ExpertsSpec(activation="silu"), impl="triton")
    assert torch.equal(out, want)
    modes.force("routing")
    assert layer.forward(x, *routing[:2]) == "vLLM's"


def gate_of(**flags):
    return types.SimpleNamespace(**{"allow_cublas_router_gemm": True, **flags})


def test_the_projection_that_turnout_takes_is_cublas_in_bfloat16():
    x = torch.empty(1, H, dtype=torch.bfloat16)
    assert gates.takes_cublas(gate_of(), x)
    assert not gates.takes_cublas(gate_of(), x.float())
    assert not gates.takes_cublas(gate_of(allow_cublas_router_gemm=False), x)
    for preferred in gates._PREFERRED:
        assert not gates.takes_cublas(gate_of(**{preferred: True}), x)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["routing", "layer"])
@pytest.mark.parametrize("num_tokens", [1, FEW_TOKENS, FEW_TOKENS + 1])
def test_a_projection_in_float32(num_tokens, mode, gpu):
    modes.force(mode)
    x, weight = torch.randn(num_tokens, 200, device=gpu).bfloat16(), torch.randn(24, 200, device=gpu).bfloat16()
    logits, cublas = gates.project(x, weight), torch.mm(x, weight.T, out_dtype=torch.float32)
    assert logits.dtype == torch.float32
    if mode == "routing" or num_tokens > FEW_TOKENS:
        assert torch.equal(logits, cublas)
    torch.testing.assert_close(logits, cublas, rtol=1e-4, atol=1e-3)
