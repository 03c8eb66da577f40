"""ParEval's files, the problems of a checkout of it, and its metrics as its own scripts compute them."""
