"""Routing: router_logits [T, E] to ids and weights [T, K], in the form that the consumer reads."""
