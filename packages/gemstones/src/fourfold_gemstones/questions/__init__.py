"""Questions that runs are asked: which law, how sure, which size, which run next, how much faster."""
