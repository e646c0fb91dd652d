"""The first station: hidden states to router logits."""
