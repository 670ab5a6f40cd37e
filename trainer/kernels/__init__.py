"""Local response normalisation in one pass over memory: C on the CPU, Triton on a GPU."""
