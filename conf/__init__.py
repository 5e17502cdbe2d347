"""Hydra groups, one choice a file. A YAML file holds only what its choice changes; defaults live in megatrain/config.py."""
