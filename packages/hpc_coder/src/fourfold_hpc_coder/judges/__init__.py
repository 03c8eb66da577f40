"""A benchmark of judges: honest, mistaken and hostile programs, and which of them a judge lets through."""
