"""megatrain pretrains GPT models, from a laptop's CPU to a cluster, and never loses a run."""

__version__ = "0.1.0"
