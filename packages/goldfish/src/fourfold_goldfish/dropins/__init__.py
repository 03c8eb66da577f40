"""The mask where the tokens are: collators and trainers, and the data sets of other training programs."""
