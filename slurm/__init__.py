"""The batch script and the cluster profiles, as package data for `megatrain train launch=slurm`."""
