"""Where one implementation of the experts overtakes another; from the records under benchmarks/results."""

# What batch_invariant=True runs on a GPU for every number of tokens.
BATCH_INVARIANT_IMPL = "grouped"
# Slots in a block of "grouped".
BLOCK_SIZES = (16, 32, 64, 128)


def are_few(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether a GPU runs "triton", which reads the weights of each slot on its own, and not "grouped".

    With fewer slots than experts most of them have an expert to themselves (128 experts, 8 per token: up to 12 tokens).
    """
    return num_tokens == 1 or num_tokens * top_k <= 0.75 * num_experts


def block_size(num_slots: int, num_experts: int) -> int:
    """Slots in a block of "grouped", for so many slots shared out among so many experts."""
    slots_of_one = num_slots / num_experts
    for rows, most in zip(BLOCK_SIZES, (8, 32, 128), strict=False):
        if slots_of_one <= most:
            return rows
    return BLOCK_SIZES[-1]
