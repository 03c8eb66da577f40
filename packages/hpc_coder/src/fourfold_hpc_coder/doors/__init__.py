"""Ways to the judge besides a file of outputs: a function, a server, and what other libraries call."""
