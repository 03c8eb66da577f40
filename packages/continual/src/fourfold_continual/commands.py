"""The commands of `fourfold-continual`: a signature is the options, a docstring the help."""
