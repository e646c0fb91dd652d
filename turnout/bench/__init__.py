"""Benchmarks: each checks results before it times them, interleaves variants, and records where it ran."""
