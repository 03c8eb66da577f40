"""From an answer's text to a verdict: compile, launch, compare, time, and ask whether it is parallel."""
