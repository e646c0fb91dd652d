"""Which module is running: a stack kept by global forward hooks, with the names that the audited model gives."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.modules import module as hooks
from torch.utils.hooks import RemovableHandle


class ModuleStack:
    """Follows calls of modules while it is entered.

    The audited module's own names are used; a module from elsewhere is named by its class, and what it
    contains by its names below that.

    Args:
        root: the audited module, or None when a function is audited.
    """

    def __init__(self, root: torch.nn.Module | None) -> None:
        self._names: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()
        self._stack: list[str] = []
        self._handles: list[RemovableHandle] = []
        if root is not None:
            self._learn(root, "")

    @property
    def current(self) -> str:
        """Dotted path of the innermost running module; "" outside any."""
        return self._stack[-1] if self._stack else ""

    def __enter__(self) -> ModuleStack:
        self._handles = [
            hooks.register_module_forward_pre_hook(self._push),
            # always_call: a module that raises must leave the stack as well
            hooks.register_module_forward_hook(self._pop, always_call=True),
        ]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._stack.clear()

    @staticmethod
    def clean(name: str) -> str:
        """A name without the wrapper that `torch.compile` puts around a module."""
        return ".".join(part for part in name.split(".") if part != "_orig_mod")

    def _learn(self, module: torch.nn.Module, prefix: str) -> None:
        for name, child in module.named_modules():
            path = self.clean(".".join(part for part in (prefix, name) if part))
            self._names.setdefault(child, path)

    def _push(self, module: torch.nn.Module, args: Any) -> None:
        if module not in self._names:
            parent = self.current
            self._learn(module, f"{parent}.{type(module).__name__}" if parent else type(module).__name__)
        self._stack.append(self._names[module])

    def _pop(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()
