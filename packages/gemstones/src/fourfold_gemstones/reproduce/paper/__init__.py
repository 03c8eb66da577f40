"""The published measurements analysed again: what the paper reports, with how sure it is.

A room for each idea. Each holds the analyses that write events of the record, and beside them the claims
that are judged from these events.
"""
