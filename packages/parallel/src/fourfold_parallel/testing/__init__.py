"""Laws on many ranks: start ranks on this machine, build grids, compare with one process."""
