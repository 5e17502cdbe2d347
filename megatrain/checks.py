"""Checks that need more than one key, or the file system. Imports no torch.

What one key may hold stands in `config.py`; which layouts are legal, in `parallel/layout.py`. Every message names the
key, what was given and the nearest value that works.
"""

from __future__ import annotations

from typing import Any


def check_values(config: Any) -> None:
    """Whether the keys of a config agree with one another. Raises ConfigError."""


def check_paths(config: Any) -> None:
    """Whether what a config names on disk is there. Raises ConfigError."""
