"""turnout as a plugin of vLLM: installed beside it, every MoE layer gets its routing in the form its consumer reads.

vLLM finds `register` by itself (entry point ``vllm.general_plugins``) in each of its processes. From then on every
Mixture-of-Experts layer that it builds computes its routing with `turnout.route`, straight into the dtype that the
layer's experts or dispatcher read. A router that turnout does not know keeps vLLM's own routing; the log says so, once,
with what was decided for each layer.

Modes, by ``TURNOUT=`` in the environment or ``--additional-config '{"turnout": "routing"}'``, which goes before it:
``off``: vLLM as it is; ``routing``, the default; ``layer``: also the experts, where that measures faster.
"""

from __future__ import annotations

from typing import Any

from turnout.integrations import _vllm_modes as modes
from turnout.integrations._vllm_report import Explained, LayerRow, log_step_aside, rows

__all__ = ["Explained", "LayerRow", "explain", "register", "use"]


def register() -> None:
    """Bind turnout to the MoE layers that vLLM builds in this process from now on; vLLM calls it.

    A second call changes nothing. With a vLLM whose functions are not as known it steps aside with one warning, and
    likewise for layers whose MoE runner is of another tool.

    Raises:
        ValueError: ``TURNOUT`` in the environment names no mode.
        ImportError: no vLLM is installed.
    """
    modes.environment_mode()
    from turnout.integrations import _vllm_runner as runner
    from turnout.integrations._vllm_gates import register_gates

    if runner.is_registered():
        return
    unknown = [signature for signature in runner.signatures() if not signature.is_known]
    if unknown:
        log_step_aside("does not know this version of vLLM", "; ".join(map(str, unknown)))
    else:
        runner.register_runner()
        register_gates()


def use(mode: str | None) -> None:
    """Let all layers of this process run in a mode from their next call on; None: each as it was configured.

    For benchmarks and tests in vLLM's process. What vLLM has compiled or captured keeps what it was made with.

    Raises:
        ValueError: no such mode.
    """
    modes.force(mode)


def explain(model: Any = None) -> Explained:
    """What turnout does in each MoE layer: router, consumer, contract, impl, reason; changes nothing.

    Args:
        model: a model of vLLM in this process; None: all layers that turnout is bound to.
    """
    from turnout.integrations import _vllm_runner as runner
    from turnout.integrations._vllm_layer import RoutedLayer

    if model is None:
        return rows(runner.layers())
    bound = (getattr(module, "turnout", None) for module in model.modules())
    return rows(layer for layer in bound if isinstance(layer, RoutedLayer))
