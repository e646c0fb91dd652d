"""Where one implementation of the experts overtakes another; from the records under benchmarks/results."""

# Up to so many tokens a GPU runs "triton", which reads the weights of each slot on its own; "grouped" from there on.
FEW_TOKENS = 12
# What batch_invariant=True runs on a GPU for every number of tokens.
BATCH_INVARIANT_IMPL = "grouped"


def block_size(num_slots: int, num_experts: int) -> int:
    """Slots in a block of "grouped", for so many slots shared out among so many experts."""
    slots_of_one = num_slots / num_experts
    for rows, most in ((16, 8), (32, 32), (64, 128)):
        if slots_of_one <= most:
            return rows
    return 128
