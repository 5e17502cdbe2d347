"""The dataset protocol: what training, evaluation and scoring need from token ids, wherever they are stored.

indexed_dataset.py implements it for prepared files. Imports no torch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Dataset(Protocol):
    """One split as one long sequence of token ids. `read` is called from a background thread."""

    @property
    def name(self) -> str:
        """Return the dataset's name for messages, such as the path of its file."""

    @property
    def num_tokens(self) -> int:
        """Return the number of token ids."""

    def read(self, start: int, count: int) -> np.ndarray:
        """Return token ids `[start, start + count)` as a new int64 array."""

    def counts(self, start: int, count: int) -> np.ndarray | None:
        """Return which tokens of `[start, start + count)` count in the loss as labels (bool); None: all of them."""

    def place(self, token: int) -> str:
        """Return where the token at this index is stored, for messages, such as "byte 198"."""

    def pause(self) -> None:
        """Close the files until the next read."""
