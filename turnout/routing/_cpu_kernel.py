"""The numba kernel behind ``cpu.py``. Importing this module imports numba."""

import math

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_NAN_KEY = np.int64(-(2**31))
_MINUS_INF = np.float32(-np.inf)
_BF16, _FP16 = 1, 2  # codes of the dtypes; 0 is float32


@intrinsic
def pointer(typingctx, address):
    """An address as the pointer that ``carray`` takes."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@njit(nogil=True, cache=True)
def bits_of(value):
    """The bits of a float32 value, as a signed integer."""
    return np.int64(np.float32(value).view(np.int32))


@njit(nogil=True, cache=True)
def value_of(bits):
    """The float32 value of bits."""
    return np.int32(bits).view(np.float32)


@njit(nogil=True, cache=True)
def half_to_float(half):
    """The value of float16 bits, as float32."""
    magnitude = np.int64(half) & 0x7FFF
    if magnitude >= 0x7C00:  # inf, NaN
        value = value_of(0x7F800000 | (magnitude & 0x3FF) << 13)
    elif magnitude >= 0x400:
        value = value_of((magnitude << 13) + 0x38000000)
    else:  # subnormal: a multiple of 2^-24
        value = np.float32(magnitude) * np.float32(2.0**-24)
    return -value if half & 0x8000 else value


@njit(nogil=True, cache=True)
def float_to_half(value):
    """float16 bits of a finite float32 value, rounded to nearest even."""
    bits = bits_of(value)
    sign = (bits >> 16) & 0x8000
    bits &= 0x7FFFFFFF
    if bits >= 0x47800000:  # from 65536 on
        half = np.int64(0x7C00)
    elif bits >= 0x38800000:
        half = (bits - 0x38000000 + 0xFFF + ((bits >> 13) & 1)) >> 13
    else:
        half = np.int64(np.rint(value_of(bits) * np.float32(2.0**24)))
    return np.uint16(half | sign)


@njit(nogil=True, cache=True)
def float_to_bfloat(value):
    """bfloat16 bits of a finite float32 value, rounded to nearest even."""
    bits = bits_of(value) & 0xFFFFFFFF
    return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@njit(nogil=True, cache=True)
def bfloat_to_float(bits):
    """The value of bfloat16 bits, as float32."""
    return value_of(np.int64(bits) << 16)


@njit(nogil=True, cache=True)
def load(floats, halves, code, index):
    """Element ``index`` of a float array of any dtype, as float32."""
    if code == _BF16:
        return bfloat_to_float(halves[index])
    if code == _FP16:
        return half_to_float(halves[index])
    return floats[index]


@njit(nogil=True, cache=True)
def store(floats, halves, code, index, value):
    """Write a float32 value to element ``index`` of a float array of any dtype, rounded once."""
    if code == _BF16:
        halves[index] = float_to_bfloat(value)
    elif code == _FP16:
        halves[index] = float_to_half(value)
    else:
        floats[index] = value


@njit(nogil=True, cache=True)
def round_to(value, code):
    """A float32 value rounded to a dtype, still as float32."""
    if code == _BF16:
        return bfloat_to_float(float_to_bfloat(value))
    if code == _FP16:
        return half_to_float(float_to_half(value))
    return value


@njit(nogil=True, cache=True)
def ordered_key(value):
    """Key that orders float32 values as numbers: -0.0 equals +0.0, NaN lies below -inf."""
    if value != value:
        return _NAN_KEY
    if value == np.float32(0.0):
        return np.int64(0)
    bits = bits_of(value)
    return bits ^ 0x7FFFFFFF if bits < 0 else bits


@njit(nogil=True, cache=True)
def unnormalized_softmax(value, best):
    """``exp(value - best)``, and 1 where they are equal: also for infinities, which then share alike."""
    if value == best:
        return np.float32(1.0)
    return np.float32(math.exp(value - best))


@njit(nogil=True, cache=True)
def tree_sum(values, count):
    """Sum of the first ``count`` values by halves, as if padded with zeros to a power of two; in place."""
    width = 1
    while width < count:
        width *= 2
    while width > 1:
        width //= 2
        for i in range(width):
            if i + width < count:
                values[i] += values[i + width]
        count = min(count, width)
    return values[0]


@njit(nogil=True, cache=True)
def select(floats, halves, code, start, num_experts, top_k, topk_keys, topk_ids):
    """The K largest logits of a row into topk_keys and topk_ids, descending, ties to the lowest id."""
    filled = 0
    for expert in range(num_experts):
        key = ordered_key(load(floats, halves, code, start + expert))
        if filled < top_k:
            slot = filled
            filled += 1
        elif key > topk_keys[top_k - 1]:
            slot = top_k - 1
        else:
            continue
        while slot > 0 and topk_keys[slot - 1] < key:
            topk_keys[slot] = topk_keys[slot - 1]
            topk_ids[slot] = topk_ids[slot - 1]
            slot -= 1
        topk_keys[slot] = key
        topk_ids[slot] = expert


@njit(nogil=True, cache=True)
def softmax_value(value):
    """A logit as the softmax sees it: NaN counts as -inf."""
    return _MINUS_INF if value != value else value


@njit(nogil=True, cache=True)
def softmax_total(floats, halves, code, start, num_experts, top_k, best, scratch):
    """The sum of the unnormalised softmax over all experts of a row."""
    if best == _MINUS_INF:
        return np.float32(top_k)  # nothing but -inf: K equal shares
    for expert in range(num_experts):
        value = softmax_value(load(floats, halves, code, start + expert))
        scratch[expert] = unnormalized_softmax(value, best)
    return tree_sum(scratch, num_experts)


@njit(nogil=True, cache=True)
def route_rows(
    logits_address, logits_code, row_stride, num_experts, top_k, renormalize, scaling_factor, rounding_code,
    scale_address, scale_code, padding_address, valid_address, sentinel, map_address, num_ids,
    weights_address, weights_code, ids_address, ids_code, first_row, end_row,
):  # fmt: skip
    """Route rows first_row to end_row; addresses of absent tensors are 0."""
    rows = max(0, end_row - 1)
    num_logits = rows * row_stride + num_experts
    logits = carray(pointer(logits_address), num_logits, np.float32)
    half_logits = carray(pointer(logits_address), num_logits, np.uint16)
    scale = carray(pointer(scale_address), num_experts, np.float32)
    half_scale = carray(pointer(scale_address), num_experts, np.uint16)
    is_padding = carray(pointer(padding_address), end_row, np.bool_)
    num_valid = carray(pointer(valid_address), 1, np.int32)
    expert_map = carray(pointer(map_address), num_experts, np.int32)
    weights = carray(pointer(weights_address), end_row * top_k, np.float32)
    half_weights = carray(pointer(weights_address), end_row * top_k, np.uint16)
    ids16 = carray(pointer(ids_address), end_row * top_k, np.int16)
    ids32 = carray(pointer(ids_address), end_row * top_k, np.int32)
    ids64 = carray(pointer(ids_address), end_row * top_k, np.int64)
    topk_keys = np.empty(top_k, np.int64)
    topk_ids = np.empty(top_k, np.int64)
    mass = np.empty(top_k, np.float32)
    scratch = np.empty(num_experts, np.float32)
    factor = np.float32(scaling_factor)
    valid = num_valid[0] if valid_address else end_row

    for row in range(first_row, end_row):
        start = row * row_stride
        is_token = row < valid and not (padding_address and is_padding[row])
        if is_token:
            select(logits, half_logits, logits_code, start, num_experts, top_k, topk_keys, topk_ids)
            best = softmax_value(load(logits, half_logits, logits_code, start + topk_ids[0]))
            for k in range(top_k):
                value = softmax_value(load(logits, half_logits, logits_code, start + topk_ids[k]))
                mass[k] = unnormalized_softmax(value, best)
                scratch[k] = mass[k]
            if renormalize:
                total = tree_sum(scratch, top_k)
            else:
                total = softmax_total(
                    logits, half_logits, logits_code, start, num_experts, top_k, best, scratch
                )  # fmt: skip
        for k in range(top_k):
            slot = row * top_k + k
            expert = sentinel
            weight = np.float32(0.0)
            if is_token:
                expert = topk_ids[k]
                weight = mass[k] / total
                if scale_address:
                    weight *= load(scale, half_scale, scale_code, expert)
                weight = round_to(weight * factor, rounding_code)
                if map_address:
                    expert = expert_map[expert]
                    if not 0 <= expert < num_ids:
                        expert = sentinel
                        weight = np.float32(0.0)
            store(weights, half_weights, weights_code, slot, weight)
            if ids_code == 0:
                ids16[slot] = expert
            elif ids_code == 1:
                ids32[slot] = expert
            else:
                ids64[slot] = expert
