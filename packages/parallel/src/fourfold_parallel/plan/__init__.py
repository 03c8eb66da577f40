"""The performance model: which grid is fastest on a machine, and why the others are not."""
