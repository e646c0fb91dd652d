"""Pairwise covering sets: every pair of values of any two axes occurs in some case."""

import itertools


def pairwise(axes, allowed=lambda case: True):
    """Cases (dicts) that between them hold every allowed pair of values; greedy, and always the same.

    ``allowed`` judges cases that may still lack axes. For every pair it allows, it must allow a completion
    that takes each further axis on its own.
    """
    waiting = dict.fromkeys(
        frozenset({a: x, b: y}.items())
        for a, b in itertools.combinations(axes, 2)
        for x, y in itertools.product(axes[a], axes[b])
        if allowed({a: x, b: y})
    )
    cases = []
    while waiting:
        case = dict(next(iter(waiting)))
        for axis in axes:
            if axis in case:
                continue
            choices = [value for value in axes[axis] if allowed({**case, axis: value})]
            case[axis] = max(choices, key=lambda v: sum(p in waiting for p in _pairs({**case, axis: v}, axis)))
        for axis in axes:
            for pair in _pairs(case, axis):
                waiting.pop(pair, None)
        cases.append({axis: case[axis] for axis in axes})
    return cases


def _pairs(case, axis):
    return [frozenset({axis: case[axis], other: case[other]}.items()) for other in case if other != axis]
