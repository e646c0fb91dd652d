"""Every experts class of the installed transformers that uses its experts interface, built small."""

import functools
import importlib
import inspect
import pathlib

import torch
import transformers

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 6, 48, 40
SIZES = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INTERMEDIATE),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS),
}


@functools.cache
def experts_classes():
    """By name."""
    classes = {}
    for path in sorted(pathlib.Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "@use_experts_implementation" in path.read_text():
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            for name, kind in vars(module).items():
                if inspect.isclass(kind) and kind.__module__ == module.__name__ and hasattr(kind, "_apply_gate"):
                    classes[name] = kind
    return classes


def drawn_experts(name, dtype=torch.float32):
    """An instance with random parameters, and a config that it shares with no other."""
    kind = experts_classes()[name]
    # Ernie's text and vision experts are one class, whose size is not the config's.
    has_size = "intermediate_size" in inspect.signature(kind.__init__).parameters
    arguments = {"intermediate_size": INTERMEDIATE} if has_size else {}
    errors = []
    for config_class in config_classes(kind):
        try:
            config = config_class()
            for field, size in SIZES.items():
                if hasattr(config, field):
                    set_size(config, field, size)
            experts = kind(config, **arguments)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            errors.append(f"{config_class.__name__}: {error}")
            continue
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.normal_(std=0.2)
        return experts.to(dtype)
    raise AssertionError(f"{name} cannot be built: {'; '.join(errors)}")


def set_size(config, field, size):
    is_list = isinstance(getattr(config, field), (list, tuple))
    setattr(config, field, [size] * len(getattr(config, field)) if is_list else size)


def config_classes(kind):
    """Those of its module, the one that its constructor names first."""
    named = inspect.signature(kind.__init__).parameters["config"].annotation
    named = named if isinstance(named, str) else getattr(named, "__name__", "")
    classes = [
        value
        for value in vars(inspect.getmodule(kind)).values()
        if inspect.isclass(value) and issubclass(value, transformers.PreTrainedConfig)
    ]
    return sorted(classes, key=lambda value: value.__name__ != named)
