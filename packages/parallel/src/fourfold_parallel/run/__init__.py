"""Runs: from a recipe to a record, a ledger of claims and a report."""
