"""The operators that torch's dispatcher, compiler and export see, called past the dispatcher where nothing looks on.

The dispatcher takes the host six to eight microseconds for an operator that is written in Python, as much as a launch.
It is there for compilers, tracers, modes, transforms, profilers and subclasses of tensors. Without any of them it does
no more than call the function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), str, int, float, bool})
# Torch has no public names for these. With a torch that lacks one, every call goes through the dispatcher.
_CAN_SEE = all(
    hasattr(owner, name)
    for owner, name in (
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C, "_len_torch_function_stack"),
        (torch._C, "_get_tracing_state"),
        (torch._C._autograd, "_profiler_enabled"),
        (torch._C._functorch, "peek_interpreter_stack"),
    )
)


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[_Kernel], _Kernel]:
    """Register the function below as an operator for all devices; the name then stands for its calls.

    An operator that writes to its arguments is always called through the dispatcher, which notes that. The first
    argument is a tensor; on ``meta``, where there are no data, the dispatcher calls ``fake``.

    Args:
        schema: ``"turnout::name(Tensor argument, ...) -> ..."``.
        fake: makes results of the right form from arguments of the same form, without data.
    """
    name, brace, signature = schema.partition("(")
    torch.library.define(name, brace + signature)
    torch.library.register_fake(name)(fake)
    # Nothing here is differentiable, and callers refuse what requires grad: autograd's own fallback is time lost.
    torch.library.impl(name, "Autograd")(torch.library.fallthrough_kernel)
    overload = getattr(torch.ops.turnout, name.removeprefix("turnout::")).default

    def register(kernel: _Kernel) -> _Kernel:
        torch.library.impl(name, "CompositeExplicitAutograd")(kernel)
        if "!" in signature:
            return overload  # type: ignore[no-any-return]

        @functools.wraps(kernel)
        def call(*arguments: Any) -> Any:
            if something_looks_on() or not are_plain(arguments) or arguments[0].is_meta:
                return overload(*arguments)
            return kernel(*arguments)

        return call  # type: ignore[return-value]

    return register


def something_looks_on() -> bool:
    """Whether a compiler, tracer, mode, transform or profiler wants to see the operators that are called."""
    return bool(
        torch.compiler.is_compiling()  # first: what follows is nothing that a compiler can follow
        or not _CAN_SEE
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def are_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether all tensors are torch's own, whose data are where they say: a subclass may stand for something else."""
    return _PLAIN.issuperset(map(type, arguments)) or all(
        type(argument) in _PLAIN or (type(argument) is tuple and are_plain(argument)) for argument in arguments
    )
