"""The batch script and the profiles of clusters, as data that `megatrain train launch=slurm` finds wherever it is installed."""
