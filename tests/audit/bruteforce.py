"""Straight-line programs over small tensors, and a slow judge of their copies.

The judge shares no code with the auditor. It runs a program cell by cell on symbols, and finds out whether a copy can
go by letting it go: every read and every kept tensor must come out the same. What has been let go stays gone for the
copies after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

DTYPES = {"i": (torch.int16, torch.int32, torch.int64), "f": (torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class Step:
    """One statement. All but "use" yield a register.

    op: "new", "double" (fresh), "cast", "clone", "half" (a view of the first or second half), "add_", "zero_", "use".
    """

    op: str
    of: int = 0
    dtype: torch.dtype = torch.int64
    second: bool = False


@dataclass(frozen=True)
class Program:
    steps: tuple[Step, ...]
    returned: frozenset[int]

    def __call__(self) -> list[torch.Tensor]:
        registers: list[torch.Tensor] = []
        for step in self.steps:
            registers.append(self._run(step, registers))
        return [registers[i] for i in sorted(self.returned)]

    @staticmethod
    def _run(step: Step, registers: list[torch.Tensor]) -> torch.Tensor:
        if step.op == "new":
            return torch.full((4,), 3, dtype=step.dtype)
        x = registers[step.of]
        if step.op == "double":
            return x * 2
        if step.op == "cast":
            return x.to(step.dtype)
        if step.op == "clone":
            return x.clone()
        if step.op == "half":
            return x[2:] if step.second else x[:2]
        if step.op == "add_":
            return x.add_(1)
        if step.op == "zero_":
            return x.zero_()
        x.sum()
        return x


@dataclass(frozen=True)
class Place:
    """What a register shows: some cells of a memory."""

    memory: int
    first: int
    size: int
    dtype: torch.dtype


@dataclass
class Run:
    """A run on symbols.

    cells: of each memory, symbols with the narrowest dtype known to hold them. seen: what each read saw.
    reads, writes: which step touched which memory. version, epoch: of the memory that step k reads, at step k.
    """

    places: list[Place] = field(default_factory=list)
    cells: list[list[tuple[object, torch.dtype]]] = field(default_factory=list)
    seen: list[object] = field(default_factory=list)
    reads: list[tuple[int, int, int]] = field(default_factory=list)  # step, memory, epoch
    writes: list[tuple[int, int]] = field(default_factory=list)  # step, memory
    version: dict[int, int] = field(default_factory=dict)
    epoch: dict[int, int] = field(default_factory=dict)
    epochs: list[int] = field(default_factory=list)


def keeps(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether b holds every value of a; the integers here are small enough for all of their dtypes."""
    return not a.is_floating_point or a.itemsize <= b.itemsize


def run(program: Program, instead: dict[int, tuple[int, int]]) -> Run:
    """Run a program; step k of `instead` yields an older register, from some cell on, in place of its own result."""
    r = Run()
    for k, step in enumerate(program.steps):
        place = r.places[step.of] if step.op != "new" else Place(-1, 0, 4, step.dtype)
        values = list(r.cells[place.memory][place.first : place.first + place.size]) if place.memory >= 0 else []
        if step.op in ("double", "cast", "clone", "add_", "use"):
            r.version[k] = sum(m == place.memory for _, m in r.writes)
            r.epoch[k] = r.epochs[place.memory]
            if k not in instead:
                r.seen.append((k, values))
                r.reads.append((k, place.memory, r.epochs[place.memory]))
        if step.op in ("add_", "zero_"):
            new = [(("+1", k, v), place.dtype) for v in values] if step.op == "add_" else [(k, torch.bool)] * place.size
            r.cells[place.memory][place.first : place.first + place.size] = new
            r.writes.append((k, place.memory))
            r.epochs[place.memory] += place.size == len(r.cells[place.memory])
        if k in instead:
            older, offset = instead[k]
            old = r.places[older]
            r.places.append(Place(old.memory, old.first + offset, place.size, old.dtype))
        elif step.op in ("new", "double", "cast", "clone"):
            r.places.append(_fresh(r, k, step, place, values))
        elif step.op == "half":
            r.places.append(Place(place.memory, place.first + 2 * step.second, 2, place.dtype))
        else:
            r.places.append(place)
    return r


def _fresh(r: Run, k: int, step: Step, place: Place, values: list) -> Place:
    dtype = step.dtype if step.op in ("new", "cast") else place.dtype
    if step.op == "new":
        values = [((k, i), dtype) for i in range(4)]
    elif step.op == "double":
        values = [(("*2", k, v), dtype) for v in values]
    elif step.op == "cast":
        values = [v if keeps(v[1], dtype) else (("round", v), dtype) for v in values]
    r.cells.append(list(values))  # what was seen must not change with the memory
    r.epochs.append(0)
    return Place(len(r.cells) - 1, 0, len(values), dtype)


class Judge:
    """Classes of a program's copies, by trial."""

    def __init__(self, program: Program) -> None:
        self.program, self.stock = program, run(program, {})
        self.kept = {self.stock.places[i].memory for i in program.returned}
        self.gone: dict[int, tuple[int, int]] = {}
        self.undoes: dict[int, int] = {}
        self.classes: dict[int, str] = {}
        self.copies = [k for k, step in enumerate(program.steps) if step.op in ("cast", "clone")]
        for k in self.copies:
            self.classes[k] = self._sharing(k)
        for k in self.copies:
            self.classes[k] = self.classes[k] or self._other(k)

    def same_without(self, k: int, older: int, offset: int = 0) -> bool:
        """Whether every read and every kept memory is the same when step k yields an older register."""
        trial = run(self.program, {**self.gone, k: (older, offset)})
        base = run(self.program, self.gone)
        reads = [entry for entry in base.seen if entry[0] != k]
        return reads == trial.seen and self._final(base) == self._final(trial)

    def _final(self, r: Run) -> list[object]:
        """What is left in each memory that the stock program keeps, seen through its first register."""
        firsts = {}
        for i, place in enumerate(self.stock.places):
            firsts.setdefault(place.memory, i)
        shown = [r.places[firsts[memory]] for memory in sorted(self.kept)]
        return [r.cells[p.memory][p.first : p.first + p.size] for p in shown]

    def _sharing(self, k: int) -> str:
        step, mine = self.program.steps[k], self.memory(k)
        if step.op == "clone":
            source = self.stock.places[step.of]
            if not self.same_without(k, step.of):
                return "needed"
            if mine in self.kept and source.memory in self.kept:
                return "undecided"
            if self.unread(k):
                return "undecided"
            if mine in self.kept and len(self.stock.cells[source.memory]) > source.size:
                return "undecided"
            self.gone[k] = step.of, 0
            return "layout"
        first, offset = self.cast_behind(k)
        if first is not None and self.same_without(k, self.program.steps[first].of, offset):
            self.gone[k] = self.program.steps[first].of, offset
            self.undoes[k] = first
            return "round trip"
        if not self.written(k):
            for j in self.copies:
                if j < k and self.same_cast(j, k) and not self.written(j):
                    if self.same_without(k, j):
                        self.gone[k] = j, 0
                        return "repeated"
                    break
        return ""

    def _other(self, k: int) -> str:
        step, source = self.program.steps[k], self.stock.places[self.program.steps[k].of]
        if self.unread(k):
            return "undecided"
        if self.is_first_leg(k):
            return "round trip"
        if not keeps(source.dtype, step.dtype):
            return "fusable"
        epoch = self.stock.epoch[k]
        readers = {s for s, memory, e in self.stock.reads if (memory, e) == (source.memory, epoch)}
        if any(self.program.steps[s].op != "cast" or self.program.steps[s].dtype != step.dtype for s in readers):
            return "needed"
        return "undecided" if source.memory in self.kept else "dtype mismatch"

    def memory(self, k: int) -> int:
        return self.stock.places[k].memory

    def written(self, k: int) -> bool:
        return any(m == self.memory(k) for _, m in self.stock.writes)

    def readers(self, k: int) -> list[int]:
        return [s for s, memory, epoch in self.stock.reads if memory == self.memory(k) and epoch == 0]

    def unread(self, k: int) -> bool:
        return self.memory(k) not in self.kept and not self.readers(k) and not self.written(k)

    def same_cast(self, j: int, k: int) -> bool:
        a, b = self.program.steps[j], self.program.steps[k]
        same = (a.op, a.dtype, self.stock.places[a.of]) == (b.op, b.dtype, self.stock.places[b.of])
        return same and self.stock.version[j] == self.stock.version[k]

    def cast_behind(self, k: int) -> tuple[int | None, int]:
        """The value-keeping cast that made what step k casts back, and from which of its cells on."""
        made_by, offset = k, 0
        while made_by == k or self.program.steps[made_by].op == "clone":
            source = self.program.steps[made_by].of
            offset += self.stock.places[source].first
            made_by = self.maker(source, made_by)
            if made_by is None:
                return None, 0
        if self.program.steps[made_by].op != "cast":
            return None, 0
        before = self.stock.places[self.program.steps[made_by].of]
        whole = before.dtype == self.program.steps[k].dtype and keeps(before.dtype, self.stock.places[made_by].dtype)
        return (made_by, offset) if whole else (None, 0)

    def maker(self, register: int, at: int) -> int | None:
        """The step that allocated what a register shows, if nothing was written to it before `at`."""
        memory = self.memory(register)
        if any(m == memory and s < at for s, m in self.stock.writes):
            return None
        return next(i for i, place in enumerate(self.stock.places) if place.memory == memory)

    def is_first_leg(self, k: int) -> bool:
        readers = self.readers(k)
        if not readers or self.memory(k) in self.kept or self.written(k):
            return False
        return all(self.undoes.get(self._through_clones(s)) == k for s in readers)

    def _through_clones(self, step: int) -> int:
        while self.program.steps[step].op == "clone" and len(self.readers(step)) == 1:
            step = self.readers(step)[0]
        return step
