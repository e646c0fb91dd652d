"""What a consumer of routing reads, and the catalogue of known consumers.

A `Contract` is the form in which one consumer reads ids and weights. The routing launch writes that form
directly, so that nothing is cast between the router and the experts. ``turnout.contracts`` maps names of
known consumers to their contracts; each entry says where the fact comes from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Literal

import torch

IDS_DTYPES = (torch.int16, torch.int32, torch.uint32, torch.int64)
WEIGHTS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRUCTURES_DTYPES = (torch.int32, torch.int64)
ID_SPACES = ("logical", "physical", "local")
STRUCTURES = (
    "tokens_per_expert",
    "expert_offsets",
    "permuted_idx",
    "inv_permuted_idx",
    "sorted_token_ids",
    "expert_ids",
    "num_tokens_post_padded",
    "bitmatrix",
    "permuted_weights",
    "block_offsets",
    "block_schedule",
)
PADDED_BLOCK_MAP = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")

_DTYPE_BY_NAME = {dtype_name: getattr(torch, dtype_name) for dtype_name in (
    "int16", "int32", "uint32", "int64", "float32", "bfloat16", "float16")}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.int32`` -> ``"int32"``."""
    return str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
    """The exact form in which a consumer reads the result of routing.

    Attributes:
        ids_dtype: dtype of ``topk_ids`` [T, K]: int16, int32, uint32 or int64.
        weights_dtype: dtype of ``topk_weights`` [T, K]: float32, bfloat16 or float16.
        sentinel: the id of a slot that carries no work (padding, not local), with weight exactly 0; an int
            outside the experts' range, or ``"num_experts"`` for the first id past it. None: the consumer
            knows no such slot.
        id_space: what an id counts: ``"logical"`` experts of the model, ``"physical"`` replicas (EPLB), or
            the experts ``"local"`` to one rank (which needs a sentinel for the others).
        structures: what the consumer would otherwise compute from the ids; names of fields of `Routing`.
        structures_dtype: dtype of their integers: int32 or int64 (the bitmatrix is uint32 always).
        num_local_experts: experts of the rank, where ``id_space`` is ``"local"``: ids and structures count these; the
            map from logical ids to them comes with each call. None: not a local id space, or known to the layer alone.
        block_size: slots in a block of the padded block map (sorted_token_ids, expert_ids, num_tokens_post_padded);
            None: none of these is asked for, or the consumer chooses the size at each call.
        key: the contract as JSON: what operators carry, and what `from_key` reads; not an argument.

    Example:
        >>> Contract(ids_dtype=torch.int64)
        Contract(ids_dtype=torch.int64, weights_dtype=torch.float32)
    """

    ids_dtype: torch.dtype = torch.int32
    weights_dtype: torch.dtype = torch.float32
    sentinel: int | Literal["num_experts"] | None = None
    id_space: Literal["logical", "physical", "local"] = "logical"
    structures: tuple[str, ...] = ()
    structures_dtype: torch.dtype = torch.int32
    block_size: int | None = None
    num_local_experts: int | None = None

    key: str = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_member("ids_dtype", self.ids_dtype, IDS_DTYPES)
        _check_member("weights_dtype", self.weights_dtype, WEIGHTS_DTYPES)
        _check_member("id_space", self.id_space, ID_SPACES)
        if not isinstance(self.structures, (tuple, list)):
            raise TypeError(f"structures must be a tuple of names, got {self.structures!r}")
        object.__setattr__(self, "structures", tuple(self.structures))
        for structure in self.structures:
            _check_member("structures", structure, STRUCTURES)
        if len(set(self.structures)) != len(self.structures):
            raise ValueError(f"structures must name each structure once, got {self.structures}")
        _check_member("structures_dtype", self.structures_dtype, STRUCTURES_DTYPES)
        for field in ("block_size", "num_local_experts"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{field} must be a positive int or None, got {value!r}")
        if self.num_local_experts is not None and self.id_space != "local":
            raise ValueError(
                f"num_local_experts={self.num_local_experts} contradicts id_space={self.id_space!r}: it counts the "
                "experts of a rank. Leave it away, or choose id_space='local'."
            )
        self._check_sentinel()
        key = ", ".join(f'"{field}": {_encoded(value)}' for field, value in self._stated().items())
        object.__setattr__(self, "key", f"{{{key}}}")

    def _check_sentinel(self) -> None:
        if self.sentinel is None:
            if self.id_space == "local":
                raise ValueError(
                    "id_space='local' contradicts sentinel=None: experts of other ranks need a mark. "
                    "Give the sentinel that the consumer skips, for instance -1."
                )
            return
        if self.sentinel == "num_experts":
            return
        if isinstance(self.sentinel, bool) or not isinstance(self.sentinel, int):
            raise TypeError(f"sentinel must be an int, 'num_experts' or None, got {self.sentinel!r}")
        limits = torch.iinfo(self.ids_dtype)
        if not limits.min <= self.sentinel <= limits.max:
            raise ValueError(
                f"sentinel={self.sentinel} contradicts ids_dtype={self.ids_dtype}: it must lie in "
                f"[{limits.min}, {limits.max}]. Choose a sentinel that the dtype holds, or another dtype."
            )

    def num_ids(self, num_experts: int) -> int:
        """How many ids there are, for a router of so many experts: all of them, or those of the rank."""
        return num_experts if self.num_local_experts is None else self.num_local_experts

    def sentinel_id(self, num_experts: int) -> int | None:
        """The sentinel as a number, for a router of so many experts; None where the consumer knows none."""
        return self.num_ids(num_experts) if self.sentinel == "num_experts" else self.sentinel

    # By the key, which says all: comparing and hashing field by field costs microseconds at every call.
    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Contract) and self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    @classmethod
    def from_key(cls, key: str) -> Contract:
        """The contract that wrote this `key`."""
        fields = json.loads(key)
        for field in ("ids_dtype", "weights_dtype", "structures_dtype"):
            if field in fields:
                fields[field] = _DTYPE_BY_NAME[fields[field]]
        return cls(**fields)

    def _stated(self) -> dict[str, object]:
        """The two dtypes, and every other field that is not at its default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.init}
        return {k: v for k, v in values.items() if k in ("ids_dtype", "weights_dtype") or v != defaults[k]}

    def __repr__(self) -> str:
        return f"Contract({', '.join(f'{k}={v!r}' for k, v in self._stated().items())})"


def _encoded(value: object) -> str:
    """A field's value as JSON, in operations that a compiler can trace (it cannot trace the json module)."""
    if isinstance(value, torch.dtype):
        return f'"{dtype_name(value)}"'
    if isinstance(value, tuple):
        return f"[{', '.join(_encoded(item) for item in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)  # names and whole numbers: nothing to escape


def _check_member(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(map(str, allowed))}; got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """One known consumer: its contract, and where that is known from.

    Attributes:
        name: ``framework.consumer`` or ``framework.consumer.variant``, lower case.
        contract: the form that needs no cast.
        reads: what the consumer reads, in a sentence.
        repository: ``owner/name`` of the consumer's source.
        path: the file within it.
        commit: the commit or release read; empty where it is not known (the note then says so).
        versions: the consumer's versions it holds for.
        evidence: ``"run"`` if seen on a running consumer, ``"read"`` if read in its source.
        also_accepts: other ids dtypes that the consumer takes without a cast.
        note: traps; a note that starts with ``open:`` is a point not settled.
    """

    name: str
    contract: Contract
    reads: str
    repository: str
    path: str
    versions: str
    evidence: Literal["run", "read"]
    commit: str = ""
    also_accepts: tuple[torch.dtype, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        _check_member("evidence", self.evidence, ("run", "read"))
        for dtype in self.also_accepts:
            _check_member("also_accepts", dtype, IDS_DTYPES)
        for field in ("name", "reads", "repository", "path", "versions"):
            if not getattr(self, field):
                raise ValueError(f"{field} of a catalogue entry must not be empty (entry {self.name!r})")


class Catalogue(Mapping[str, Contract]):
    """Names of consumers to their contracts: ``turnout.contracts["transformers.eager"]``."""

    def __init__(self) -> None:
        self._added: dict[str, CatalogueEntry] = {}

    @functools.cached_property
    def _entries(self) -> dict[str, CatalogueEntry]:
        from turnout.catalogue import ENTRIES  # it needs the classes above

        return {entry.name: entry for entry in ENTRIES}

    def entry(self, name: str) -> CatalogueEntry:
        """The entry of a consumer, with its source.

        Raises:
            KeyError: no consumer of that name; the message lists names that come near.
        """
        if name in self._added:
            return self._added[name]
        if name in self._entries:
            return self._entries[name]
        import difflib

        near = difflib.get_close_matches(name, list(self), n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise KeyError(
            f"no consumer named {name!r} in the catalogue. {hint}`turnout contracts` lists all; "
            "turnout.contracts.register(...) adds one."
        )

    def register(self, entry: CatalogueEntry) -> None:
        """Add a consumer for this process.

        Raises:
            TypeError: not a `CatalogueEntry`.
            ValueError: the name is taken by another entry.
        """
        if not isinstance(entry, CatalogueEntry):
            raise TypeError(f"register takes a turnout.CatalogueEntry, got {type(entry).__name__}")
        if entry.name in self and self.entry(entry.name) != entry:
            raise ValueError(f"a consumer named {entry.name!r} is in the catalogue already; choose another name")
        self._added[entry.name] = entry

    def __getitem__(self, name: str) -> Contract:
        return self.entry(name).contract

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from (name for name in self._added if name not in self._entries)

    def __len__(self) -> int:
        return sum(1 for _ in self)


contracts = Catalogue()
