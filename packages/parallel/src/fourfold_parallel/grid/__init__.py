"""The four-dimensional grid of AxoNN (SC'24): tensor products over data, depth, row and col."""
