"""The reproduction of AxoNN's paper: its numbers, what we run beside them, its claims and figures."""
