"""`megatrain prepare`: make a dataset ready for training. `data/preparation.py` does the work."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from megatrain.config import PrepareConfig
from megatrain.config.compose import compose
from megatrain.config.suggest import next_step
from megatrain.config.values import quoted
from megatrain.data import preparation


def prepare(config: PrepareConfig) -> Path:
    """Prepare the dataset that `config` describes, say what to type next, and return its folder."""
    folder = preparation.prepare(config)
    given = {"data.name": config.data.name, "data.dir": config.data.dir}
    default = asdict(compose("train", []).data)
    words = [
        shlex.quote(quoted(key, value)) for key, value in given.items() if value != default[key.removeprefix("data.")]
    ]
    print(next_step(" ".join(["megatrain train", *words])), file=sys.stderr)
    return folder
