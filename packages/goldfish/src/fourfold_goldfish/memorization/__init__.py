"""The memory of a model: extraction, membership, exposure, and a report of all that it recites."""
