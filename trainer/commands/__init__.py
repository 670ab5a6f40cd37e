"""The commands about nets: flags and words."""
