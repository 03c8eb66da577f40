"""Tasks on which depth can be dialled."""
