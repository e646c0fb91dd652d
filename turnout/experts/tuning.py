"""Where one implementation of the experts overtakes another; from the records under benchmarks/results."""

# Up to so many tokens a GPU runs "triton", which reads the weights of each slot on its own; "grouped" from there on.
FEW_TOKENS = 16
# What batch_invariant=True runs on a GPU for every number of tokens.
BATCH_INVARIANT_IMPL = "grouped"
