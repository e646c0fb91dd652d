"""Triton functions that the kernels of more than one station use. Importing those modules imports triton."""

MAX_KERNEL_EXPERTS = 1024  # a kernel holds a row of logits whole
# Slots in a block, for each row of block_offsets and block_schedule: what triton_kernels chooses from at each launch.
SCHEDULE_BLOCK_SIZES = (16, 32, 64, 128, 256)
# floor(2^32 / golden ratio): times the number of a row, modulo 2^32, it chooses among the replicas of an expert.
REPLICA_HASH = 2654435769
