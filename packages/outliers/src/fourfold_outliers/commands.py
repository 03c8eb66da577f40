"""The commands of `fourfold-outliers`: a signature is the options, a docstring the help."""
