"""What a model is trained and evaluated on: a protocol, so that token ids may come from files, memory or elsewhere.

The prepared files on disk are read by indexed_dataset.py. Imports no torch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Dataset(Protocol):
    """One split as a single run of token ids. `read` may be called from several threads."""

    @property
    def name(self) -> str:
        """What messages call it, such as the path of its file."""

    @property
    def num_tokens(self) -> int:
        """Token ids in the split."""

    def read(self, start: int, count: int) -> np.ndarray:
        """Return token ids `[start, start + count)` as a new int64 array."""

    def place(self, token: int) -> str:
        """Return where token number `token` is stored, for messages, such as "byte 198"."""
