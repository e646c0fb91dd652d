"""Combine: the outputs of each token's K experts to one row [H], weighted."""
