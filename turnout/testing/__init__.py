"""What tests and benchmarks share: inputs, checks, the tiny model and its measures."""
