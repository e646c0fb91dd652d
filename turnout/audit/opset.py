"""What PyTorch's operators do to memory: which write, which only look at metadata, which make the host wait.

Read from the operator's schema wherever the schema says it; the short tables below hold the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

# One tensor in, the same values out. `cat` belongs here when all but one of its inputs are empty.
COPY_PACKETS = frozenset({"aten._to_copy", "aten.clone", "aten.copy_", "aten.cat", "prims.convert_element_type"})

_GEMM_PACKETS = frozenset(
    {
        "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._grouped_mm", "aten._scaled_mm", "aten.mv",
        "aten._scaled_grouped_mm", "aten._int_mm", "aten.linear", "aten.matmul", "aten.addmv", "aten.dot",
        "aten._addmm_activation",
    }
)  # fmt: skip

# The result's size or a Python number depends on values, so the host waits for the device.
_HOST_PACKETS = {
    "aten._local_scalar_dense": "reads one element into a Python number",
    "aten.nonzero": "the size of the result depends on the values",
    "aten.masked_select": "the size of the result depends on the values",
    "aten.equal": "returns a Python bool",
    "aten._unique2": "the size of the result depends on the values",
    "aten.unique_dim": "the size of the result depends on the values",
    "aten.unique_consecutive": "the size of the result depends on the values",
    "aten.bincount": "the size of the result depends on the values",
    "aten.repeat_interleave.Tensor": "the size of the result depends on the values",
}

# These take a tensor for its shape and dtype only.
_METADATA_ONLY = frozenset(
    {
        "aten.empty_like", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.rand_like",
        "aten.randn_like", "aten.randint_like", "aten.new_empty", "aten.new_zeros", "aten.new_ones",
        "aten.new_full", "aten.new_empty_strided",
    }
)  # fmt: skip

# These replace what they write without reading it first.
_WRITE_ONLY = frozenset(
    {"aten.copy_", "aten.fill_", "aten.zero_", "aten.normal_", "aten.uniform_", "aten.random_", "aten.set_",
     "aten.bernoulli_", "aten.exponential_"}
)  # fmt: skip

# These write some elements of what they are given, wherever indices or a mask point.
_SCATTERED_WRITES = frozenset(
    {
        "aten.index_put_", "aten._index_put_impl_", "aten.index_copy_", "aten.index_add_", "aten.index_fill_",
        "aten.index_reduce_", "aten.masked_fill_", "aten.masked_scatter_", "aten.scatter_", "aten.scatter_add_",
        "aten.scatter_reduce_", "aten.put_", "aten.fill_diagonal_", "aten.resize_",
    }
)  # fmt: skip

# Views whose schema does not say so.
_UNDECLARED_VIEWS = frozenset({"aten._unsafe_view", "aten._reshape_alias", "aten.lift_fresh", "aten.view_as_real"})

# Pointwise and reducing operators that walk any strides (TensorIterator), beside everything tagged pointwise.
_ANY_STRIDES = frozenset(
    {"aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.any", "aten.all", "aten.prod", "aten.index",
     "aten.copy_", "aten._to_copy", "aten.clone", "aten.cat", "aten.index_select", "aten.gather",
     "aten.embedding", "aten._local_scalar_dense", "aten.std", "aten.var"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class OpTraits:
    """What an operator's schema and the tables say of it.

    Attributes:
        written: names of the arguments that it writes.
        write_only: of those, the names of the ones that it does not read first.
        is_view: it returns other shapes of the same memory and touches no element.
        reads_values: False where tensor arguments serve for shape and dtype only.
        scattered: its writes reach only some elements of what is written.
        any_strides: it is known to read any strides without first copying to contiguous memory.
        composite: it only calls other operators. Autograd takes it apart before a recorder sees it; in inference
            mode, where autograd is left out, nobody has.
    """

    name: str
    packet: str
    argument_names: tuple[str, ...]
    written: frozenset[str]
    write_only: frozenset[str]
    is_view: bool
    reads_values: bool
    scattered: bool
    any_strides: bool
    composite: bool


@cache
def traits_of(func: torch._ops.OpOverload) -> OpTraits:
    """Traits of one operator overload, worked out once."""
    schema = func._schema
    packet = ".".join(str(func).split(".")[:2])
    written = frozenset(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    outs = frozenset(a.name for a in schema.arguments if a.name in written and a.is_out)
    declared_view = not written and any(r.alias_info is not None for r in schema.returns)
    return OpTraits(
        name=str(func),
        packet=packet,
        argument_names=tuple(a.name for a in schema.arguments),
        written=written,
        write_only=written if packet in _WRITE_ONLY else outs,
        is_view=declared_view or packet in _UNDECLARED_VIEWS,
        reads_values=packet not in _METADATA_ONLY,
        scattered=packet in _SCATTERED_WRITES,
        any_strides=torch.Tag.pointwise in func.tags or packet in _ANY_STRIDES,
        composite=torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
    )


def is_gemm(packet: str) -> bool:
    """Whether the operator is a matrix product."""
    return packet in _GEMM_PACKETS


def why_host_waits(name: str, packet: str, reads_bool_index: bool) -> str:
    """Why the operator makes the host wait for the device; "" where it does not."""
    if packet in ("aten.index", "aten.index_put_", "aten._index_put_impl_") and reads_bool_index:
        return "a boolean mask is turned into indices, whose number depends on the values"
    return _HOST_PACKETS.get(packet) or _HOST_PACKETS.get(name, "")
