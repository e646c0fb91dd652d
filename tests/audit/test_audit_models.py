"""Real models: what stock transformers casts, what is left after `turnout.apply`."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import turnout
from turnout.audit import audit, audit_decoder, models
from turnout.audit.report import AuditReport
from turnout.audit.rules import REDUNDANT, CopyKind

pytest.importorskip("transformers")

# Modules that make the Mixture-of-Experts part of a Gemma 4 layer; the rest of the layer is dense.
MOE = (
    "router.norm",
    "router",
    "post_feedforward_layernorm_1",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_2",
    "experts",
)
NORM = {"fusable": 1, "repeated": 1}  # the result rounded, the weight cast at every call
OF_EACH_MODULE = {
    "router.norm": {"repeated": 1, "fusable": 1},
    "router": {"dtype mismatch": 1},
    "post_feedforward_layernorm_1": {**NORM, "dtype mismatch": 1},
    "pre_feedforward_layernorm_2": {"repeated": 2, "fusable": 1},
}


def casts_of_layer(report: AuditReport, layer: str, phase: str) -> dict[str, Counter]:
    """Explicit casts in one layer's Mixture-of-Experts part, by module and class."""
    casts: dict[str, Counter] = {}
    for f in report.select(phase=phase):
        below = f.module.removeprefix(f"{layer}.")
        if f.is_cast and f.from_dtype and below in MOE:
            casts.setdefault(below, Counter())[f.kind.value] += f.count
    return casts


def total(casts: dict[str, Counter]) -> int:
    return sum(counter.total() for counter in casts.values())


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return models.load("tiny", dtype=torch.bfloat16)


class TestStockGemma4:
    @pytest.mark.parametrize(
        ("experts", "of_experts", "of_norm_after"),
        [
            ("grouped_mm", {"dtype mismatch": 1, "fusable": 1}, {**NORM, "dtype mismatch": 1}),
            ("batched_mm", {"fusable": 1}, {**NORM, "dtype mismatch": 1}),
        ],
    )
    def test_every_cast_has_its_class_and_module(self, tiny, experts, of_experts, of_norm_after) -> None:
        tiny.set_experts_implementation(experts)
        report = audit_decoder(tiny, prefill=64, decode=1)
        assert not report.error
        wanted = {**OF_EACH_MODULE, "experts": of_experts, "post_feedforward_layernorm_2": of_norm_after}
        layers = tiny.config.num_hidden_layers
        for phase in ("prefill", "decode"):
            for layer in range(layers):
                casts = casts_of_layer(report, f"model.layers.{layer}", phase)
                assert casts == wanted
                assert total(casts) == {"grouped_mm": 14, "batched_mm": 13}[experts]

    def test_eager_experts_of_the_trained_checkpoint_round_once_per_expert_that_is_hit(self) -> None:
        """12 casts outside the experts of each layer, and one for each expert that its router chose."""
        model = models.load("tiny", dtype=torch.bfloat16, experts="eager")
        chosen: list[int] = []
        for layer in model.model.layers:
            layer.experts.register_forward_pre_hook(lambda _, args: chosen.append(len(args[1].unique())))
        report = audit_decoder(model, prefill=64, decode=0)
        casts = [casts_of_layer(report, f"model.layers.{i}", "prefill") for i in range(len(model.model.layers))]
        assert [layer["experts"] for layer in casts] == [{"fusable": hit} for hit in chosen]
        assert [total(layer) for layer in casts] == [12 + hit for hit in chosen]
        assert len(chosen) == model.config.num_hidden_layers

    def test_eager_experts_round_once_for_each_of_sixteen(self) -> None:
        """12 casts outside the experts, and one for each of the 16 experts: 28."""
        model = models.small_gemma4(torch.bfloat16, num_hidden_layers=1)
        model.set_experts_implementation("eager")
        report = audit_decoder(model, prefill=64, decode=1)
        casts = casts_of_layer(report, "model.layers.0", "prefill")
        assert casts["experts"] == {"fusable": 16}
        assert total(casts) == 28
        assert total(casts_of_layer(report, "model.layers.0", "decode")) == 16
        assert report.select(CopyKind.HOST, region="experts"), "the loop over experts waits for the device"

    def test_copies_have_evidence_remedy_and_a_line_of_source(self, tiny) -> None:
        report = audit_decoder(tiny, prefill=8, decode=0)
        assert all(f.evidence and f.source for f in report.findings)
        assert all(f.remedy for f in report.redundant())
        (logits, *_) = report.select(CopyKind.DTYPE_MISMATCH, region="routing")
        assert logits.producer == "mm in model.layers.0.router.proj"
        assert logits.consumers == ("softmax in model.layers.0.router",)
        assert "modeling_gemma4.py" in logits.source


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
class TestAfterApply:
    def test_no_redundant_copy_from_router_logits_to_the_output_of_the_experts(self, experts) -> None:
        model = models.load("tiny", dtype=torch.bfloat16, experts=experts)
        before = audit_decoder(model, prefill=16, decode=1)
        turnout.apply(model)
        after = audit_decoder(model, prefill=16, decode=1)
        assert before.redundant_count("routing") == 2 * model.config.num_hidden_layers
        if experts != "eager":  # whose casts are of sums that change
            assert before.redundant_count("experts") >= model.config.num_hidden_layers
        assert not after.error
        assert after.redundant("routing") == after.redundant("experts") == ()
        for operator in ("turnout::route", "turnout::experts"):
            assert any(operator in note for note in after.notes), "the regions must hold our operators"

    def test_routers_alone_leave_the_copies_of_stock_experts(self, experts) -> None:
        model = models.load("tiny", dtype=torch.bfloat16, experts=experts)
        before = audit_decoder(model, prefill=16, decode=1)
        turnout.apply(model, experts=False)
        after = audit_decoder(model, prefill=16, decode=1)
        assert after.redundant("routing") == ()
        if experts != "eager":  # the hit experts, and with them the loop, may differ where logits tie
            assert inside_experts(after) == inside_experts(before)


def inside_experts(report: AuditReport) -> Counter:
    """Stock experts' own copies."""
    return Counter({(f.module, f.kind, f.phase): f.count for f in report.select(*REDUNDANT, region="experts")})


@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-qwen3-moe"])
class TestOtherFamilies:
    def test_router_logits_are_widened_for_softmax_in_every_layer(self, name) -> None:
        model = models.load(name, dtype=torch.bfloat16)
        report = audit_decoder(model, prefill=16, decode=1)
        layers = {f.module for f in report.select(CopyKind.DTYPE_MISMATCH, region="routing", phase="decode")}
        assert layers == {f"model.layers.{i}.mlp.gate" for i in range(model.config.num_hidden_layers)}

    def test_the_routing_region_ends_where_the_experts_begin(self, name) -> None:
        report = audit_decoder(models.load(name, dtype=torch.bfloat16), prefill=16, decode=0)
        assert report.select(region="experts")
        assert all(not f.module.endswith("experts") for f in report.select(region="routing"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_mode_hides_nothing(tiny, mode) -> None:
    tiny.set_experts_implementation("grouped_mm")
    with mode():
        report = audit(tiny, torch.arange(16)[None])
    assert not report.error
    assert (report.redundant_count(), report.redundant_count("routing")) == (126, 6)


def test_thirty_layers_at_decode_are_audited() -> None:
    model = models.small_gemma4(torch.bfloat16, num_hidden_layers=30, num_experts=128, top_k_experts=8)
    report = audit_decoder(model, prefill=16, decode=2)
    assert len({f.module for f in report.select(CopyKind.DTYPE_MISMATCH, region="routing")}) == 30


class TestBadInput:
    def test_an_unknown_model_is_named_with_what_there_is(self) -> None:
        with pytest.raises(ValueError, match=r"could not load the model 'no-such/model'.*tiny-mixtral"):
            models.load("no-such/model", dtype=torch.bfloat16)

    @pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is here, so none is missing")
    def test_a_device_that_is_not_here_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"device 'cuda' was asked for, but .* sees no accelerator here"):
            models.load("tiny", dtype=torch.bfloat16, device="cuda")

    def test_sizes_that_make_no_sense_are_refused(self, tiny) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            audit_decoder(tiny, prefill=0)

    def test_a_module_without_vocabulary_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"no config\.vocab_size"):
            audit_decoder(torch.nn.Linear(2, 2))
