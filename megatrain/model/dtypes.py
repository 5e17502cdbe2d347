"""The number formats of the config as torch dtypes. Their names and sizes, without torch, are in formats.py."""

from __future__ import annotations

import torch

from megatrain.model.formats import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in DTYPE_NAMES.items()}
"""The dtype that each format computes in."""
