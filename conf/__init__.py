"""Hydra groups, one choice per file. A file holds only what its choice changes; defaults are in megatrain/config/."""
