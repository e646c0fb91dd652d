"""Experts: hidden states [T, H] and a routing to the weighted sum of each token's K experts, [T, H]."""
