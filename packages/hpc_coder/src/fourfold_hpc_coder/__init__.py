"""HPC-Coder-V2: Studying Code LLMs Across Low-Resource Parallel Languages (Chaturvedi et al.): to come."""
