"""Any transformers model at toy size on every grid, compared with itself in one process."""
