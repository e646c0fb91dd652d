"""Puts alike findings together, so that a report on thirty equal layers reads as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from turnout.audit.regions import fold
from turnout.audit.report import Finding
from turnout.audit.rules import CopyKind


def fold_layers(findings: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    """Group findings by layer, and layers that have the same findings under one label.

    Returns:
        Pairs of a label, such as ``model.layers.0-29 (x 30)``, and the findings of one such layer with
        `module` shortened to the path below it.
    """
    layers: dict[str, Counter[Finding]] = {}
    for f in findings:
        layer, below = split_layer(f.module)
        layers.setdefault(layer, Counter())[_without_number(f, layer, below)] += f.count
    same: dict[tuple[str, frozenset[tuple[Finding, int]]], list[str]] = {}
    for layer, content in layers.items():
        same.setdefault((fold(layer), frozenset(content.items())), []).append(layer)
    folded = []
    for members in same.values():
        content = layers[members[0]]
        folded.append((_label(members), [replace(f, count=n, bytes=f.bytes * n) for f, n in content.items()]))
    return folded


def across_phases(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Group findings that differ in nothing but phase, shape and number."""
    groups: dict[Finding, list[Finding]] = {}
    for f in findings:
        groups.setdefault(replace(f, phase="", shape=(), count=0, bytes=0), []).append(f)
    return list(groups.values())


def split_layer(module: str) -> tuple[str, str]:
    """A module path cut behind its first layer number: the layer, and the path below it.

    Examples:
        >>> split_layer("model.layers.3.router.norm")
        ('model.layers.3', 'router.norm')
        >>> split_layer("lm_head")
        ('lm_head', '')
    """
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1]), ".".join(parts[i + 1 :])
    return module, ""


def _without_number(f: Finding, layer: str, below: str) -> Finding:
    """A finding as any layer of its kind would have it, so that equal ones compare equal."""

    def folded(text: str) -> str:
        return fold_in_text(text.replace(f"{layer}.", "")) if layer != fold(layer) else text

    alike = replace(f, module=below, count=1, bytes=f.bytes // f.count)
    if not (f.is_redundant or f.kind is CopyKind.HOST):  # only counted in a tree: their grounds may differ
        return replace(alike, evidence="", remedy="", producer="", consumers=())
    return replace(
        alike,
        evidence=folded(f.evidence),
        remedy=folded(f.remedy),
        producer=folded(f.producer),
        consumers=tuple(folded(text) for text in f.consumers),
    )


def fold_in_text(text: str) -> str:
    """`fold` applied to each word of a sentence.

    Examples:
        >>> fold_in_text("mm in layers.0.proj stores bfloat16")
        'mm in layers.*.proj stores bfloat16'
    """
    return " ".join(fold(word) if "." in word else word for word in text.split(" "))


def _label(layers: list[str]) -> str:
    if len(layers) == 1:
        return layers[0] or "outside any module"
    stem, numbers = layers[0].rpartition(".")[0], sorted(int(layer.rpartition(".")[2]) for layer in layers)
    return f"{stem}.{number_ranges(numbers)} (x {len(layers)})"


def number_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs joined.

    Examples:
        >>> number_ranges([0, 1, 2, 6])
        '0-2,6'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
