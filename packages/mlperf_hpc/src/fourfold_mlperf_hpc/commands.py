"""The commands of `fourfold-mlperf-hpc`: a signature is the options, a docstring the help."""
