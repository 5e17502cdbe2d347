"""`megatrain prepare`: make a dataset ready for training. `data/preparation.py` does the work."""

from __future__ import annotations

from pathlib import Path

from megatrain.config import PrepareConfig
from megatrain.data import preparation


def prepare(config: PrepareConfig) -> Path:
    """Prepare the dataset that `config` describes and return its folder."""
    return preparation.prepare(config)
