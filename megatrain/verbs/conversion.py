"""What `megatrain export` and `megatrain import` share."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from megatrain.config.suggest import next_step
from megatrain.config.values import quoted
from megatrain.interop.load_model import Loaded
from megatrain.model.count import num_parameters


def print_result(loaded: Loaded, out: Path, dtype: str, *next_commands: str, is_model: bool = True) -> None:
    """Describe what was converted and what to type next on standard error; the written folder on standard output."""
    count = num_parameters(loaded.config)
    print(f"{loaded.describe()}: {count:,} parameters, {dtype}", file=sys.stderr)
    if loaded.tokenizer is None:
        print("  without a tokenizer: none was found", file=sys.stderr)
    elif is_model and loaded.config.output == "score":
        judge = shlex.quote(quoted("judge", str(out)))
        next_commands = (f"megatrain evaluate '<run>' prompts=prompts.jsonl {judge}", *next_commands)
    elif is_model:
        next_commands = (f'megatrain generate {shlex.quote(str(out))} prompt="Once upon a time"', *next_commands)
    if next_commands:
        print(next_step(*next_commands), file=sys.stderr)
    print(out, flush=True)
