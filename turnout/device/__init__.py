"""Triton functions that the kernels of more than one station use. Importing this room's modules imports triton."""

MAX_KERNEL_EXPERTS = 1024  # a kernel holds a row of logits whole
