"""Scaling up Test-Time Compute with Latent Reasoning: A Recurrent Depth Approach (Geiping et al.): to come."""
