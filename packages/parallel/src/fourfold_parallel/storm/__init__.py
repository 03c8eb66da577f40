"""Kills over a training: what it loses, whether it ends as if nothing had been, what is left behind."""
