"""Make other models of trained ones without training: merge, quantise, prune."""
