"""Local response normalisation and the update rule in one pass over memory: C on the CPU, Triton on a GPU."""
