"""The CPU's fast path from stored image to network input, in C."""
