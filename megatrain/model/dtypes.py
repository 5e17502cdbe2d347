"""The number formats of the config by their names. What each is used for is the reader's."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""What each format computes in; fp8 is inside some matrix products alone (fp8.py)."""
