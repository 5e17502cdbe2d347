"""What `megatrain export` and `megatrain import` share."""

from __future__ import annotations

import sys
from pathlib import Path

from megatrain.interop.load_model import Loaded
from megatrain.model.count import num_parameters


def print_result(loaded: Loaded, out: Path, dtype: str) -> None:
    """Describe what was converted on standard error; print the written folder on standard output."""
    count = num_parameters(loaded.config)
    print(f"{loaded.describe()}: {count:,} parameters, {dtype}", file=sys.stderr)
    if loaded.tokenizer is None:
        print("  without a tokenizer: none was found", file=sys.stderr)
    print(out, flush=True)
