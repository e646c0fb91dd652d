"""Small programs whose copies are known: what each makes, in program order, and why it stands here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MISMATCH, TRIP, REPEATED, LAYOUT = "dtype mismatch", "round trip", "repeated", "layout"
HOST, FUSABLE, NEEDED, UNDECIDED = "host", "fusable", "needed", "undecided"


@dataclass(frozen=True)
class Program:
    """A program, its inputs, and the classes of its copies and waits in program order."""

    id: str
    fn: Callable[..., object]
    args: tuple[object, ...]
    expected: tuple[str, ...]


F32 = torch.linspace(-2, 2, 24).reshape(4, 6)
BF16 = F32.bfloat16()
IDS = torch.tensor([[3, 1], [0, 2], [1, 3], [2, 0]])


@torch.library.custom_op("turnout_gallery::topk_int32", mutates_args=())
def topk_int32(scores: Tensor) -> Tensor:
    """A fused router that stores int32 ids, as the one before PR #40565 did; its own cast is not in sight."""
    return scores.topk(2).indices.int()


@torch.library.custom_op("turnout_gallery::fill_int32", mutates_args=("out",))
def fill_int32(scores: Tensor, out: Tensor) -> None:
    out.copy_(scores.topk(2).indices)


class Norm(nn.Module):
    """A weighted RMS norm that computes in float32, as most models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (wide * self.weight.float()).to(x.dtype)


NORM = Norm()


class CachedNorm(Norm):
    """As `Norm`, but it keeps the float32 weight."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "wide"):
            self.wide = self.weight.float()
        return x * self.wide


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Norm(), Norm())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 1)


class State:
    """Memory that outlives a call."""

    def __init__(self) -> None:
        self.cache = torch.zeros(8, 6)


STATE = State()
TABLE = torch.arange(4.0, dtype=torch.bfloat16)


def pr_40565(scores: Tensor) -> Tensor:
    ids = topk_int32(scores)
    return torch.zeros_like(scores).scatter(1, ids.long(), 1.0)


def pr_40565_out_argument(scores: Tensor) -> Tensor:
    ids = torch.empty(4, 2, dtype=torch.int32)
    fill_int32(scores, ids)
    return scores.gather(1, ids.long())


def two_readers_of_one_form(scores: Tensor) -> Tensor:
    ids = topk_int32(scores).long()
    return scores.gather(1, ids) * scores.gather(1, 5 - ids)


def both_forms_read(scores: Tensor) -> Tensor:
    ids = topk_int32(scores)
    return scores.gather(1, ids.long()) + (ids + 1)


def returned_in_both_forms(scores: Tensor) -> tuple[Tensor, Tensor]:
    ids = topk_int32(scores)
    return ids, scores.gather(1, ids.long())


def reader_through_a_view(scores: Tensor) -> Tensor:
    ids = topk_int32(scores)
    return scores.flatten()[ids.view(-1)[2:].long()]


def other_reader_through_a_view(scores: Tensor) -> Tensor:
    ids = topk_int32(scores)
    flat = ids.view(-1)
    return scores.flatten()[flat.long()] + flat.neg()


def round_trip_of_floats(x: Tensor) -> Tensor:
    y = x * 2
    return y.float().bfloat16() + 1


def round_trip_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    return y.float().view(-1).bfloat16() + 1


def rounding_is_no_round_trip(x: Tensor) -> Tensor:
    y = x * 2
    return y.bfloat16().float() + 1


def there_and_back_with_work(x: Tensor) -> Tensor:
    y = x * 2
    return y.float().exp().bfloat16() + 1


def back_after_the_original_changed(x: Tensor) -> Tensor:
    y = x * 2
    wide = y.float()
    y.mul_(3)
    return wide.bfloat16() + y


def ids_narrowed_and_widened(scores: Tensor) -> Tensor:
    ids = scores.topk(2).indices
    return scores.gather(1, ids.int().long())


def same_cast_twice(x: Tensor) -> Tensor:
    y = x * 2
    return (y.float().exp() + y.float().sin()) * y


def same_cast_after_a_write(x: Tensor) -> Tensor:
    y = x * 2
    a = y.float().exp()
    y.mul_(3)
    return a + y.float().sin()


def same_cast_of_a_reshape(x: Tensor) -> Tensor:
    y = x * 2
    return (y.float().exp().view(-1) + y.view(-1).float().sin()).sum() * y


def casts_of_two_halves(x: Tensor) -> Tensor:
    low, high = (x * 2).chunk(2, -1)
    return low.float().exp() + high.float().sin()


def captured_table(ids: Tensor) -> Tensor:
    return TABLE.float()[ids]


def captured_table_cast_twice(ids: Tensor) -> Tensor:
    return TABLE.float()[ids] + TABLE.float()[3 - ids]


def captured_table_rounded(ids: Tensor) -> Tensor:
    return TABLE.half()[ids]


def clone_of_a_fresh_tensor(x: Tensor) -> Tensor:
    return (x * 2).clone() + 1


def clone_protects_the_original(x: Tensor) -> Tensor:
    y = x * 2
    z = y.clone()
    z.add_(1)
    return z * y


def clone_before_the_original_changes(x: Tensor) -> Tensor:
    y = x * 2
    old = y.clone()
    y.add_(1)
    return old * y


def clone_written_when_the_original_is_dead(x: Tensor) -> Tensor:
    z = (x * 2).clone()
    z.add_(1)
    return z * 3


def clone_of_a_clone_before_a_write(x: Tensor) -> Tensor:
    y = x * 2
    twice = y.clone().clone()
    y.add_(1)
    return twice * y


def write_to_the_other_half(x: Tensor) -> Tensor:
    y = x * 2
    top = y[:2].clone()
    y[2:].add_(1)
    return top.exp() + y[2:]


def contiguous_for_a_pointwise_reader(x: Tensor) -> Tensor:
    return (x * 2).t().contiguous() + 1


def contiguous_for_a_matrix_product(x: Tensor) -> Tensor:
    return (x * 2).t().contiguous() @ x


def contiguous_for_two_readers(x: Tensor) -> Tensor:
    y = (x * 2).t().contiguous()
    return y.exp() + y.sin()


def reshape_that_must_copy(x: Tensor) -> Tensor:
    return (x * 2).t().reshape(-1) + 1


def repeated_rows(x: Tensor) -> Tensor:
    return (x * 2).repeat_interleave(3, 0) @ x.t()


def fill_the_cache(x: Tensor) -> None:
    STATE.cache[:4].copy_(x * 2)


def fill_the_cache_in_another_dtype(x: Tensor) -> None:
    STATE.cache[:4].copy_(x * 2)


def return_a_view_of_a_copy(x: Tensor) -> Tensor:
    return (x * 2).clone()[1:]


def return_the_argument_copied(x: Tensor) -> Tensor:
    return x.clone()


def read_a_number(x: Tensor) -> float:
    return x.sum().item() + 1


def boolean_mask(x: Tensor) -> Tensor:
    return x[x > 0] * 2


def boolean_values_at_integer_indices(ids: Tensor) -> Tensor:
    hit = torch.zeros(4, dtype=torch.bool)
    hit[ids.view(-1)] = ids.view(-1) > 1
    return hit


def boolean_mask_written_through(x: Tensor) -> Tensor:
    y = x * 2
    y[x > 0] = x[0, 0]
    return y


def masked_fill_needs_no_indices(x: Tensor) -> Tensor:
    return x.masked_fill(x > 0, 0.0)


def rounded_at_the_end(x: Tensor) -> Tensor:
    return (x * 2).bfloat16()


def counts_truncated(x: Tensor) -> Tensor:
    return (x * 2).long() + 1


def under_autocast(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x + 1) @ weight


def result_dropped(x: Tensor) -> Tensor:
    y = x * 2
    y.float()
    return y + 1


def write_through_an_alias(x: Tensor) -> Tensor:
    y = x * 2
    alias = y.detach().view(-1)
    old = y.clone()
    alias[3:].fill_(7.0)
    return old * y


def one_tensor_concatenated(x: Tensor) -> Tensor:
    return torch.cat([x.new_empty(0), (x * 2).view(-1)]) + 1


def buffer_of_ids(scores: Tensor) -> Tensor:
    ids = torch.empty(4, 2, dtype=torch.int64)
    ids.copy_(topk_int32(scores))
    return scores.gather(1, ids)


def nested_tensor(x: Tensor) -> Tensor:
    nested = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
    return (nested * 2).clone().bfloat16() + 1


def sparse_tensor(x: Tensor) -> Tensor:
    return (x.to_sparse() * 2).clone().to_dense()


COMPILED = torch.compile(lambda x: (x * 2).clone() + 1, backend="eager")


def compiled_inside(x: Tensor) -> Tensor:
    return COMPILED(x + 1) * 2


PROGRAMS = [
    Program("pr_40565", pr_40565, (F32,), (MISMATCH,)),
    Program("pr_40565_out_argument", pr_40565_out_argument, (F32,), (MISMATCH,)),
    Program("two_readers_of_one_form", two_readers_of_one_form, (F32,), (MISMATCH,)),
    Program("both_forms_read", both_forms_read, (F32,), (NEEDED,)),
    Program("returned_in_both_forms", returned_in_both_forms, (F32,), (UNDECIDED,)),
    Program("reader_through_a_view", reader_through_a_view, (F32,), (MISMATCH,)),
    Program("other_reader_through_a_view", other_reader_through_a_view, (F32,), (NEEDED,)),
    Program("ids_from_the_caller", lambda x, ids: x.gather(1, ids.long()), (F32, IDS.int()), (UNDECIDED,)),
    Program("round_trip_of_floats", round_trip_of_floats, (BF16,), (TRIP, TRIP)),
    Program("round_trip_through_a_view", round_trip_through_a_view, (BF16,), (TRIP, TRIP)),
    Program("rounding_is_no_round_trip", rounding_is_no_round_trip, (F32,), (FUSABLE, MISMATCH)),
    Program("there_and_back_with_work", there_and_back_with_work, (BF16,), (MISMATCH, FUSABLE)),
    Program("back_after_the_original_changed", back_after_the_original_changed, (BF16,), (NEEDED, FUSABLE)),
    Program("ids_narrowed_and_widened", ids_narrowed_and_widened, (F32,), (TRIP, TRIP)),
    Program("same_cast_twice", same_cast_twice, (BF16,), (NEEDED, REPEATED)),
    Program("same_cast_after_a_write", same_cast_after_a_write, (BF16,), (NEEDED, MISMATCH)),
    Program("same_cast_of_a_reshape", same_cast_of_a_reshape, (BF16,), (NEEDED, REPEATED)),
    Program("casts_of_two_halves", casts_of_two_halves, (BF16,), (MISMATCH, MISMATCH)),
    Program("parameter_recast", Norm(), (BF16,), (UNDECIDED, REPEATED, FUSABLE)),
    Program("parameter_cast_once_and_kept", CachedNorm(), (BF16,), (NEEDED,)),
    Program("nested_modules", Nested(), (BF16,), (MISMATCH, REPEATED, FUSABLE) * 2),
    Program("parameter_of_a_module_from_elsewhere", lambda x: NORM(x), (BF16,), (UNDECIDED, REPEATED, FUSABLE)),
    Program("captured_table", captured_table, (IDS,), (UNDECIDED,)),
    Program("captured_table_cast_twice", captured_table_cast_twice, (IDS,), (UNDECIDED, REPEATED)),
    Program("captured_table_rounded", captured_table_rounded, (IDS,), (UNDECIDED,)),
    Program("clone_of_a_fresh_tensor", clone_of_a_fresh_tensor, (F32,), (LAYOUT,)),
    Program("clone_protects_the_original", clone_protects_the_original, (F32,), (NEEDED,)),
    Program("clone_before_the_original_changes", clone_before_the_original_changes, (F32,), (NEEDED,)),
    Program("clone_written_when_the_original_is_dead", clone_written_when_the_original_is_dead, (F32,), (LAYOUT,)),
    Program("clone_of_a_clone_before_a_write", clone_of_a_clone_before_a_write, (F32,), (LAYOUT, NEEDED)),
    Program("write_to_the_other_half", write_to_the_other_half, (F32,), (LAYOUT,)),
    Program("write_through_an_alias", write_through_an_alias, (F32,), (NEEDED,)),
    Program("contiguous_for_a_pointwise_reader", contiguous_for_a_pointwise_reader, (F32,), (LAYOUT,)),
    Program("contiguous_for_a_matrix_product", contiguous_for_a_matrix_product, (F32,), (LAYOUT,)),
    Program("contiguous_for_two_readers", contiguous_for_two_readers, (F32,), (UNDECIDED,)),
    Program("reshape_that_must_copy", reshape_that_must_copy, (F32,), (NEEDED,)),
    Program("repeated_rows", repeated_rows, (F32,), (NEEDED,)),
    Program("fill_the_cache", fill_the_cache, (F32,), (NEEDED,)),
    Program("fill_the_cache_in_another_dtype", fill_the_cache_in_another_dtype, (BF16,), (MISMATCH,)),
    Program("buffer_of_ids", buffer_of_ids, (F32,), (MISMATCH,)),
    Program("return_a_view_of_a_copy", return_a_view_of_a_copy, (F32,), (LAYOUT,)),
    Program("return_the_argument_copied", return_the_argument_copied, (F32,), (UNDECIDED,)),
    Program("one_tensor_concatenated", one_tensor_concatenated, (F32,), (LAYOUT,)),
    Program("read_a_number", read_a_number, (F32,), (HOST,)),
    Program("boolean_mask", boolean_mask, (F32,), (HOST,)),
    Program("boolean_values_at_integer_indices", boolean_values_at_integer_indices, (IDS,), ()),
    Program("boolean_mask_written_through", boolean_mask_written_through, (F32,), (HOST,)),
    Program("masked_fill_needs_no_indices", masked_fill_needs_no_indices, (F32,), ()),
    Program("rounded_at_the_end", rounded_at_the_end, (F32,), (FUSABLE,)),
    Program("counts_truncated", counts_truncated, (F32,), (NEEDED,)),
    Program("under_autocast", under_autocast, (F32, F32.t().clone()), (UNDECIDED, FUSABLE)),
    Program("result_dropped", result_dropped, (BF16,), (UNDECIDED,)),
    Program("nested_tensor", nested_tensor, (F32,), (UNDECIDED, FUSABLE)),
    Program("sparse_tensor", sparse_tensor, (F32,), (UNDECIDED,)),
    Program("compiled_inside", compiled_inside, (F32,), (LAYOUT,)),
]
