"""alexnet-bench: what the loader and the step can do on this machine, and which one limits."""
