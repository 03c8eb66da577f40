"""Recurrent depth: test-time compute in latent space (Geiping et al. 2025); to come."""
