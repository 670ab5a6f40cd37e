"""Any image's bytes -> 256x256 RGB, and the names of ImageNet's classes."""
