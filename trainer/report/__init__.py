"""What came of a run: pictures, a page, TensorBoard."""
