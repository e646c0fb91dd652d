"""The plugin in a real engine of vLLM on a CPU, found by its entry point, with the tiny Gemma 4 that turnout ships."""

import logging
import types

import pytest
import torch

from turnout.integrations import _vllm_modes, _vllm_runner, _vllm_select
from turnout.integrations import vllm as plugin

LAYERS, E, K = 6, 32, 4
PROMPTS = ["Hello world", "The quick brown fox jumps over", "A"]


class Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def log():
    logger, handler = logging.getLogger("vllm.plugins.turnout"), Log()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def configured_modes():
    yield
    plugin.use(None)


def moe_runners(model):
    return [module for module in model.modules() if isinstance(module, _vllm_runner.stock_runner())]


def experts_route(engine):
    """Whether vLLM's experts for CPUs route by themselves, before 0.30, and its router only says how."""
    return moe_runners_of(engine)[0].routed_experts.quant_method.is_monolithic


def moe_runners_of(engine):
    return engine.apply_model(moe_runners)[0]


def tokens(engine):
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    return [list(each.outputs[0].token_ids) for each in engine.generate(PROMPTS, parameters, use_tqdm=False)]


def test_every_layer_is_routed_and_said_once(engine, log):
    assert {row.state for row in plugin.explain()} <= {"undecided", "routed"}
    tokens(engine)
    tokens(engine)
    rows = plugin.explain()
    assert len(rows) == LAYERS == len(moe_runners_of(engine))
    assert engine.apply_model(lambda model: plugin.explain(model) == rows) == [True]
    router = "CustomRoutingRouter" if experts_route(engine) else "CPURouter"
    assert {(row.router, row.state, row.impl, row.mode) for row in rows} == {(router, "routed", "cpu", "routing")}
    assert {(row.contract_name, row.contract.ids_dtype) for row in rows} == {("vllm.cpu_unquantized", torch.int32)}
    assert len(log.messages) <= 1
    folded = rows[0].layer.replace("0", "*")
    assert f"6 x {folded}: {router} -> vllm.cpu_unquantized int32, routed, impl cpu" in str(rows)


def test_the_summary_is_logged_when_the_last_layer_has_decided(engine, log):
    tokens(engine)
    layers = _vllm_runner.layers()
    for layer in layers:
        layer.plan, layer.reported = None, False
    tokens(engine)
    tokens(engine)
    assert log.messages == [str(plugin.explain())]


def test_answers_are_vllms_own_but_for_ties_at_the_boundary(engine, monkeypatch):
    ours, records = tokens(engine), []
    plugin.use("off")
    (record_experts if experts_route(engine) else record_routers)(records, monkeypatch)
    stock = tokens(engine)
    assert len(records) >= LAYERS * 16
    ties = sum(differing_rows(layer, logits, theirs) for layer, logits, theirs in records)
    assert ties or ours == stock


def record_routers(records, monkeypatch):
    """What vLLM's own routers are given, and what they give."""

    def recording(layer, stock):
        def select(hidden_states, router_logits, *args, **kwargs):
            result = stock(hidden_states, router_logits, *args, **kwargs)
            records.append((layer, router_logits.clone(), [tensor.clone() for tensor in result]))
            return result

        return select

    for layer in _vllm_runner.layers():
        monkeypatch.setattr(layer, "_stock_select", recording(layer, layer._stock_select))


def record_experts(records, monkeypatch):
    """Likewise of experts that route: they tell the layers' custom functions apart, and nothing else."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    layers = {layer.router.custom_routing_function: layer for layer in _vllm_runner.layers()}
    stock = cpu_moe.select_experts

    def select(custom_routing_function, **kwargs):
        result = stock(custom_routing_function=custom_routing_function, **kwargs)
        logits = kwargs["router_logits"].clone()
        records.append((layers[custom_routing_function], logits, [tensor.clone() for tensor in result]))
        return result

    monkeypatch.setattr(cpu_moe, "select_experts", select)


def differing_rows(layer, logits, theirs):
    """How many rows have other experts than vLLM's, which must tie at the boundary; the rest has its weights."""
    with torch.inference_mode():
        topk_weights, topk_ids = layer.plan.select(None, logits, None)
    ranked = logits.sort(-1, descending=True).values
    ours, stock = (torch.zeros_like(logits).scatter_(1, ids.long(), w) for w, ids in ((topk_weights, topk_ids), theirs))
    differs = (topk_ids.sort(-1).values != theirs[1].sort(-1).values).any(-1)
    assert (ranked[:, K - 1] == ranked[:, K])[differs].all()
    torch.testing.assert_close(ours[~differs], stock[~differs], rtol=0, atol=2e-7)
    return int(differs.sum())


def test_modes_are_switched_at_run_time(engine, monkeypatch):
    calls = []
    route_prepared = _vllm_select.route_prepared
    monkeypatch.setattr(_vllm_select, "route_prepared", lambda *args: calls.append(1) or route_prepared(*args))
    plugin.use("off")
    tokens(engine)
    assert not calls
    assert {row.state for row in plugin.explain()} == {"off"}
    plugin.use("layer")
    tokens(engine)
    assert len(calls) >= LAYERS * 16
    assert {(row.mode, row.state) for row in plugin.explain()} == {("layer", "routed")}


@torch.inference_mode()
def test_the_simulator_crashes_stock_experts_on_a_cpu_and_runs_with_the_plugin(engine, monkeypatch):
    from vllm.model_executor.layers.fused_moe.router import routing_simulator_router

    if experts_route(engine):
        pytest.skip("before vLLM 0.30 its experts for CPUs route by themselves, and call no simulator")
    strategy = types.SimpleNamespace(VLLM_MOE_ROUTING_SIMULATION_STRATEGY="uniform_random")
    monkeypatch.setattr(routing_simulator_router, "envs", strategy)  # the engine has frozen the environment
    runner = moe_runners_of(engine)[0]
    router = routing_simulator_router.RoutingSimulatorRouter(top_k=K, global_num_experts=E)
    hidden_states, logits = torch.randn(3, 128, dtype=torch.bfloat16), torch.randn(3, E)
    apply = lambda: runner._apply_quant_method(hidden_states, logits, None)[1]
    monkeypatch.setattr(runner, "router", router)
    with pytest.raises(RuntimeError, match="expected scalar type Int but found Long"):
        apply()
    layer = _vllm_runner.RoutedLayer(runner, "routing", lambda: None)
    layer.router._select_experts = layer.select_experts
    assert apply().shape == (3, 128)
    assert layer.plan.state == "simulated"


def test_registering_twice_changes_nothing(engine):
    constructor = _vllm_runner.stock_runner().__init__
    assert constructor.is_turnout
    plugin.register()
    assert _vllm_runner.stock_runner().__init__ is constructor


@pytest.fixture
def constructor(engine, monkeypatch):
    """vLLM's own, with nothing registered."""
    stock = _vllm_runner.stock_runner()
    constructor = stock.__init__.__wrapped__
    monkeypatch.setattr(stock, "__init__", constructor)
    return constructor


def test_an_unknown_function_of_vllm_makes_it_step_aside(constructor, monkeypatch, log):
    name = ("router.base_router", "BaseRouter._select_experts")
    monkeypatch.setitem(_vllm_runner._SIGNATURES, name, ("hidden_states", "logits"))
    plugin.register()
    assert _vllm_runner.stock_runner().__init__ is constructor
    assert len(log.messages) == 1
    assert "does not know this version of vLLM" in log.messages[0]
    assert "BaseRouter._select_experts: wanted (hidden_states, logits, ...), found (hidden_states, " in log.messages[0]


def test_runners_of_vllm_are_bound_under_any_name_and_another_tools_left_alone(constructor, monkeypatch, log):
    stock, bound = _vllm_runner.stock_runner(), []
    monkeypatch.setattr(stock, "__init__", lambda self, layer_name=0, moe_config=0, router=0, routed_experts=0: None)
    monkeypatch.setattr(_vllm_runner, "bind", lambda runner: bound.append(runner) or "binding")
    plugin.register()
    vllms = type("TransformersMoERunner", (stock,), {"__module__": "vllm.model_executor.models.transformers.moe"})()
    other = type("OtherRunner", (stock,), {"__module__": "other"})
    assert not any(hasattr(runner, "turnout") for runner in (other(), other()))
    assert (bound, vllms.turnout) == ([vllms], "binding")
    assert log.messages == ["turnout does not know an MoE runner, and leaves it alone: other.OtherRunner"]


def test_modes_come_from_the_environment_and_from_vllms_configuration(monkeypatch):
    monkeypatch.delenv("TURNOUT", raising=False)
    assert _vllm_modes.configured_mode({}) == "routing"
    monkeypatch.setenv("TURNOUT", "layer")
    assert _vllm_modes.configured_mode(types.SimpleNamespace()) == "layer"
    assert _vllm_modes.configured_mode({"turnout": "off"}) == "off"
    message = "must be one of off, routing, layer; got 'fast'"
    with pytest.raises(ValueError, match="additional-config " + message):
        _vllm_modes.configured_mode({"turnout": "fast"})
    with pytest.raises(ValueError, match="mode " + message):
        plugin.use("fast")
    monkeypatch.setenv("TURNOUT", "fast")
    with pytest.raises(ValueError, match="TURNOUT in the environment " + message):
        plugin.register()


def test_compiled_models_are_kept_apart_by_mode(engine):
    configured = engine.llm_engine.vllm_config.additional_config
    assert configured["turnout"] == "routing"
    assert configured["turnout_version"]


def test_zz_an_error_in_route_fails_the_engine_with_its_message(engine, monkeypatch):
    def fail(*_):
        raise ArithmeticError("injected into route")

    monkeypatch.setattr(_vllm_select, "route_prepared", fail)
    with pytest.raises(ArithmeticError, match="injected into route"):
        tokens(engine)
