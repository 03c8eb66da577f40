"""What only reproduces the paper."""
