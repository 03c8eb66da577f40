"""Measurements of a selection on a model: perplexity, passkeys, tasks, a diagnosis, times and bytes."""
