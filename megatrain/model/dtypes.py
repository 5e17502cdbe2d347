"""The config's number formats as torch dtypes. formats.py has their names and sizes, and imports no torch."""

from __future__ import annotations

import torch

from megatrain.model.formats import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in DTYPE_NAMES.items()}
"""The torch dtype that each format computes in."""
