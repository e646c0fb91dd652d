"""Rows of hidden states, copied to the experts that their tokens chose, and the experts' GEMMs over such rows."""
