"""Functions to write in a parallel model, with everything that decides whether an answer is right."""
