"""The ``quantization_config`` that the compressed-tensors library writes into config.json: which scheme is a module's.

Source: ``quantization/quant_config.py``, ``quant_scheme.py`` and ``utils/match.py`` of compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, NoReturn

SCHEMES_RUN = (
    "turnout runs, with symmetric weights: w4a16 (int4 in groups), w4a8_int8 (int4 in groups, int8 activations), "
    "w8a8_int8 (int8 by channel or tensor, int8 activations) and w8a8_fp8 (float8 by channel or tensor, float8 "
    "activations); activations are symmetric, by token and dynamic"
)
_PRESETS = "ready-made schemes of the library that name these: W4A16, W4A8, W8A8, FP8_DYNAMIC"


class Scheme(NamedTuple):
    """The fields of `turnout.ExpertsSpec` that say how a module is quantised."""

    quantization: str
    group_size: int | None


class Recipe:
    """The quantisation of a checkpoint.

    Raises:
        NotImplementedError: it quantises more than weights and inputs of modules, or is not compressed.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._groups: list[dict[str, Any]] = list(config["config_groups"].values())
        self._ignore: list[str] = list(config.get("ignore") or ())
        self._refuse_more_than_modules(config)

    def scheme_of(self, module: str) -> Scheme | None:
        """How a linear module of this name is quantised; None: not at all.

        Raises:
            NotImplementedError: by a scheme that turnout does not run.
        """
        if any(_names(target, module) for target in self._ignore):
            return None
        group = self._group_of(module)
        return None if group is None else _scheme(module, group)

    def _group_of(self, module: str) -> dict[str, Any] | None:
        """The first group that names the module; by name goes before by pattern, and that before by class."""
        for kind in ("name", "pattern", "class"):
            for group in self._groups:
                for target in group["targets"]:
                    if _kind_of(target) == kind and (target == "Linear" or _names(target, module)):
                        return group
        return None

    def _refuse_more_than_modules(self, config: dict[str, Any]) -> None:
        for field in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if config.get(field):
                raise NotImplementedError(
                    f"the checkpoint has {field}={config[field]!r}, which turnout does not run; {SCHEMES_RUN}"
                )
        status = config.get("quantization_status", "compressed")
        if status != "compressed":
            raise NotImplementedError(
                f"the checkpoint has quantization_status={status!r}: its weights are not compressed. Save it with "
                "the library's ModelCompressor.compress_model"
            )


def _kind_of(target: str) -> str:
    return "pattern" if target.startswith("re:") else "class" if target == "Linear" else "name"


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


_QUANTIZATIONS = {  # by kind and strategy of the weights, kind of the activations
    ("int4", "group", "none"): "w4a16",
    ("int4", "group", "int8"): "w4a8_int8",
    ("int8", "channel", "int8"): "w8a8_int8",
    ("int8", "tensor", "int8"): "w8a8_int8",
    ("float8", "channel", "float8"): "w8a8_fp8",
    ("float8", "tensor", "float8"): "w8a8_fp8",
}


def _scheme(module: str, group: dict[str, Any]) -> Scheme:
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    quantization = _QUANTIZATIONS.get((_kind(weights), weights.get("strategy", ""), _kind(inputs)))
    if quantization is None or not _are_static(weights) or not _are_by_token(inputs) or group.get("output_activations"):
        _refuse(module, group)
    return Scheme(quantization, weights["group_size"] if weights["strategy"] == "group" else None)


def _kind(arguments: dict[str, Any]) -> str:
    return f"{arguments.get('type', 'int')}{arguments.get('num_bits', 8)}" if arguments else "none"


def _are_static(weights: dict[str, Any]) -> bool:
    """Symmetric, fixed, and in the order of the columns (``actorder="weight"`` orders them in calibration alone)."""
    ordered = weights.get("actorder") in (None, False, "weight", "static")
    return bool(weights.get("symmetric", True)) and not weights.get("dynamic") and ordered


def _are_by_token(inputs: dict[str, Any]) -> bool:
    """Symmetric, and each token by itself as it comes; or none at all."""
    if not inputs:
        return True
    return bool(inputs.get("symmetric", True)) and inputs.get("dynamic") is True and inputs.get("strategy") == "token"


def _refuse(module: str, group: dict[str, Any]) -> NoReturn:
    parts = ", ".join(
        f"{name} {_described(group[name])}"
        for name in ("weights", "input_activations", "output_activations")
        if group.get(name)
    )
    raise NotImplementedError(
        f"{module} is quantised by a scheme that turnout does not run: {parts or 'nothing named'}. {SCHEMES_RUN} "
        f"({_PRESETS}). Quantise the model anew, or let transformers dequantise it"
    )


def _described(arguments: dict[str, Any]) -> str:
    words = [_kind(arguments), "symmetric" if arguments.get("symmetric", True) else "asymmetric"]
    words += [f"{name}={arguments[name]}" for name in ("strategy", "group_size", "actorder", "dynamic")
              if arguments.get(name)]  # fmt: skip
    return f"({' '.join(words)})"
