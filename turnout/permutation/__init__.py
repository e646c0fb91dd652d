"""Permutation: the slots of a routing in the order of their experts."""
