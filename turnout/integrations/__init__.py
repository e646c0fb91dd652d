"""turnout inside other libraries: names and shapes are translated at this border, nothing else."""
