"""What is there, and whether it is right."""
