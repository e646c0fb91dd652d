"""Triton functions that the kernels of more than one station use. Importing this room's modules imports triton."""
