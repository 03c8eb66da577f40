"""MLPerf HPC (Farrell et al. 2021): time to quality, taken apart."""
