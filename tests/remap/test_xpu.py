"""Selection for an XPU, which is not there: fake tensors of that device, and versions of the consumer that are made up.

What runs on the way is seen by a dispatch mode, and inside of the operators by the profiler.
"""

import importlib.metadata

import pytest
import torch
from remap_cases import make_ids, make_map
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import turnout
from turnout.impls import launch_of
from turnout.integrations.vllm_xpu_kernels import RemapArguments, XpuFusedMoe, consumer, remap_hidden_states
from turnout.remap import ops

ROUTER = turnout.RouterSpec(num_experts=16, top_k=4, renormalize=True)
COPIES = {"aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous"}


class Recorded(TorchDispatchMode):
    """The operators that run, and the implementation that each of turnout's was told to run."""

    def __init__(self):
        super().__init__()
        self.names, self.impls = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "prim":  # what a fake tensor is asked about itself
            self.names.append(function.name())
        if function.namespace == "turnout":
            names = [argument.name for argument in function._schema.arguments]
            self.impls.append(args[names.index("impl")])
        return function(*args, **kwargs or {})


def layer_of(device, expert_map=None):
    """A layer of 4 of 16 experts where there is a map, of all 16 without."""
    num_experts = 16 if expert_map is None else 4
    w13, w2 = torch.ones(num_experts, 8, 12, device=device), torch.ones(num_experts, 6, 8, device=device)
    return XpuFusedMoe(w13, None, None, w2, None, None, 4, "silu", num_experts, expert_map=expert_map)


def run_layer(device, contract, with_map=False, impl="auto"):
    """Router logits and hidden states to the output of a layer."""
    logits = torch.linspace(-1, 1, 80, device=device).view(5, 16)
    hidden_states = torch.linspace(-1, 1, 40, device=device).view(5, 8)
    expert_map = make_map(16, 4).to(device) if with_map else None
    layer, output = layer_of(device, expert_map), torch.empty(5, 8, device=device)

    def call():
        routing = turnout.route(logits, ROUTER, contract, impl=impl)
        layer.apply(output, hidden_states, routing.topk_weights, routing.topk_ids, impl=impl)
        return routing

    return call


@pytest.fixture
def xpu():
    if torch.cuda.is_available():
        pytest.skip("a torch built for CUDA has no XPU tensors, not even fake ones")
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("xpu:0")


@pytest.fixture
def installed(monkeypatch):
    """Pretend that a version of vllm_xpu_kernels is installed, or none."""

    def pretend(version):
        def version_of(name):
            assert name == "vllm_xpu_kernels"
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", version_of)

    return pretend


VERSIONS = [
    ("0.0.1", torch.int64), ("0.1.3.1", torch.int64), ("0.1.7", torch.int64), ("0.1.8.dev3+g702c024", torch.int64),
    ("0.1.8rc1", torch.int64), ("0.1.8", torch.int32), ("v0.1.8", torch.int32), ("0.1.8.post1", torch.int32),
    ("0.1.8+xpu", torch.int32), ("0.1.12.1", torch.int32), ("0.1.16.2", torch.int32), ("0.2", torch.int32),
    ("1.0.0", torch.int32), (None, torch.int32),
]  # fmt: skip


@pytest.mark.parametrize(("version", "ids_dtype"), VERSIONS, ids=[str(version) for version, _ in VERSIONS])
def test_the_contract_follows_the_installed_version(version, ids_dtype, installed):
    """What leads up to 0.1.8 counts as before it: int64 is read without a cast on both sides of the change."""
    installed(version)
    found = consumer()
    assert found.contract.ids_dtype == ids_dtype
    assert found.contract.structures == ()
    entry = turnout.contracts.entry(found.name)
    assert entry.contract.ids_dtype == ids_dtype
    assert torch.int64 in (ids_dtype, *entry.also_accepts)
    assert entry.repository == "vllm-project/vllm-xpu-kernels"
    assert (version or "not installed") in found.reason


def test_a_version_can_be_named(installed):
    installed("0.1.3.1")
    assert consumer("0.1.16.2").contract.ids_dtype == torch.int32
    with pytest.raises(ValueError, match=r"version must be one of vllm-xpu-kernels, such as '0.1.16.2', got 'new'"):
        consumer("new")


@pytest.mark.parametrize("with_map", [False, True], ids=["local_ids", "expert_map"])
@pytest.mark.parametrize("version", ["0.1.7", "0.1.16.2"])
def test_on_an_xpu_auto_takes_triton_from_logits_to_output(version, with_map, xpu):
    contract = consumer(version).contract
    call = run_layer(xpu, contract, with_map)
    with Recorded() as recorded:
        routing = call()
    turnouts = [name for name in recorded.names if name.startswith("turnout::")]
    assert turnouts == ["turnout::route", "turnout::remap", "turnout::remapped_experts", "turnout::combine_out"]
    assert recorded.impls == ["triton"] * 4
    assert recorded.names == turnouts, "nothing runs between the operators"
    assert routing.topk_ids.device == xpu
    assert routing.topk_ids.dtype == contract.ids_dtype


def test_launches_on_an_xpu_are_on_the_device_of_the_tensors(xpu, monkeypatch):
    """Two XPUs: torch is asked for the accelerator's devices, and for no vendor's."""
    pytest.importorskip("triton", reason="triton is not installed")
    from turnout.device import launch

    entered = []
    monkeypatch.setattr(launch, "_device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: entered.append(index))
    launch.on_device_of(torch.empty(2, device="xpu:1"))
    assert entered == [1]


def operators_inside(call):
    """The names of the torch operators that run during a call, after one that warms up."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return [event.name for event in profiler.events() if "::" in event.name]


@pytest.mark.parametrize("with_map", [False, True], ids=["local_ids", "expert_map"])
@pytest.mark.parametrize("version", ["0.1.7", "0.1.16.2"])
def test_no_copy_from_logits_to_output(version, with_map, kernel_device):
    """Neither between the operators nor inside of them, for the ids that either version reads."""
    seen = operators_inside(run_layer(kernel_device, consumer(version).contract, with_map))
    assert "turnout::remap" in seen
    assert not COPIES & set(seen)


def test_a_planted_cast_is_seen(kernel_device, monkeypatch):
    """The check itself: one ``.to()`` inside of the operator breaks the budget."""
    launch = launch_of("remap", "cpu" if kernel_device.type == "cpu" else "triton")

    def with_a_cast(hidden_states, topk_ids, *others):
        launch(hidden_states, topk_ids.to(torch.int64), *others)

    contract = consumer("0.1.16.2").contract
    remapped_experts = launch_of("remap", "cpu" if kernel_device.type == "cpu" else "triton", "launch_experts")
    monkeypatch.setattr(ops, "launch_of", lambda room, impl, name="": remapped_experts if name else with_a_cast)
    assert COPIES & set(operators_inside(run_layer(kernel_device, contract)))


class EmulationOfRemapBefore018:
    """An EMULATION of what vllm-xpu-kernels did before v0.1.8 (2fa2976): not its code, and not run on its hardware.

    Its operator read int64 ids alone, and its Python wrapper cast int32 ids in front of it, in every layer.
    """

    def __init__(self):
        self.casts = 0

    def __call__(self, call):
        if call.topk_ids.dtype == torch.int32:
            self.casts += 1
            call = call._replace(topk_ids=call.topk_ids.to(torch.int64))
        assert call.topk_ids.dtype == torch.int64, "misread: the operator takes the ids for int64"
        remap_hidden_states(*call)


@pytest.mark.parametrize(("version", "casts"), [("0.1.16.2", 1), ("0.1.7", 0)], ids=["int32_ids", "right_contract"])
def test_casts_of_a_consumer_that_reads_int64_alone(version, casts, kernel_device):
    """One in each layer with the ids that Gemma 4's kernel writes in vLLM, none with those of the right contract."""
    emulation, layers, contract = EmulationOfRemapBefore018(), 3, consumer(version).contract
    logits = torch.linspace(-1, 1, 80, device=kernel_device).view(5, 16)
    hidden_states = torch.linspace(-1, 1, 40, device=kernel_device).view(5, 8)
    rows = torch.empty(20, 8, device=kernel_device)
    counts = torch.empty(16, dtype=torch.int32, device=kernel_device)
    positions = torch.empty(5, 4, dtype=torch.int32, device=kernel_device)

    def forward():
        for _ in range(layers):
            ids = turnout.route(logits, ROUTER, contract).topk_ids
            emulation(RemapArguments(hidden_states, None, rows, None, None, counts, positions, ids, 16, 16))

    seen = operators_inside(forward)
    assert emulation.casts == 2 * layers * casts  # of two forwards
    assert seen.count("turnout::remap_out") == layers
    assert seen.count("aten::copy_") == layers * casts


def test_the_emulation_is_right_with_either_dtype(kernel_device):
    for ids_dtype in (torch.int32, torch.int64):
        ids = make_ids("uniform", 5, 4, 16, ids_dtype, kernel_device)
        hidden_states = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(kernel_device)
        rows = torch.empty(20, 8, device=kernel_device)
        counts = torch.empty(16, dtype=torch.int32, device=kernel_device)
        positions = torch.empty(5, 4, dtype=torch.int32, device=kernel_device)
        call = RemapArguments(hidden_states, None, rows, None, None, counts, positions, ids, 16, 16)
        EmulationOfRemapBefore018()(call)
        assert torch.equal(rows[positions.long().flatten()], hidden_states.repeat_interleave(4, dim=0))
