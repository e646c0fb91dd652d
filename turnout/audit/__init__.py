"""Finds the redundant copies of any PyTorch model or function, and says who makes them for whom.

Read in this order: `api` (what), `recorder` and `graph` (what is recorded), `rules` with `aliasing` and `layout` (how
it is judged), `report` (what comes out). `device_time` measures what copies cost.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from turnout.audit.api import audit, audit_calls, audit_decoder

if TYPE_CHECKING:
    from turnout.audit.report import AuditReport

__all__ = ["audit", "audit_calls", "audit_decoder"]


class _CallableModule(ModuleType):
    """`turnout.audit(model)` is the front door, and `turnout.audit.report` a module: both names are this one."""

    def __call__(self, fn_or_model: Any, /, *args: Any, **kwargs: Any) -> "AuditReport":
        return audit(fn_or_model, *args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
