"""HPC-Coder-V2 (Chaturvedi et al. 2024): a code model for parallel programs, and a scorer one can trust."""
