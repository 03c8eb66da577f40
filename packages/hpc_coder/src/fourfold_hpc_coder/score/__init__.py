"""Scoring a file of outputs: every answer judged once, journalled, tabulated and reported."""
