"""The reproduction of KARMA's paper: measured timelines, and its claims."""
