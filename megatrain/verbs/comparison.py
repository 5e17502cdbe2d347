"""The table that `merge` and `compress` print: size, held-out loss and speed of each model, before and after."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from megatrain.config import EvaluateConfig
from megatrain.distributed.devices import device_by_name
from megatrain.errors import ConfigError, DataError
from megatrain.interop.load_model import Loaded, load
from megatrain.model.count import num_parameters
from megatrain.model.sampling import generate
from megatrain.verbs.evaluate import Windows, evaluate_loss, find_pairs, windows_of

BATCH_SIZE = 8
WRITTEN = 64
"""Tokens that are sampled to time it; the first half is not counted."""
ROOM = 1.5
"""Memory that evaluating a model takes, as a multiple of its fp32 weights."""


@dataclass(frozen=True)
class Row:
    """A model's name, step and bytes of weights, and what was measured; None where nothing was.

    `read_per_s` and `written_per_s` are tokens a second: of whole sequences whose loss is computed, and of a text that
    is sampled token by token, alone.
    """

    name: str
    step: int | None
    bytes: int
    loss: float | None = None
    read_per_s: float | None = None
    written_per_s: float | None = None


class Comparing(Protocol):
    """The keys of a verb that compares models."""

    compare: bool
    data: str | None
    max_batches: int | None
    device: str


def with_losses(
    rows: Sequence[Row], models: Sequence[Path | Loaded], config: Comparing, speed: bool = False
) -> list[Row]:
    """Return the rows with held-out losses, if `compare` asks for them and the data is at hand; `speed` times them too.

    A model that is given by its path is loaded when its turn comes. All read in the windows of the first.

    Data that is not at hand is told on standard error; it is an error only if `data` names it.
    """
    if not config.compare:
        return list(rows)
    found: list[Row] = []
    windows: Windows | None = None
    try:
        for row, model in zip(rows, models, strict=True):
            loaded = load(model) if isinstance(model, Path) else model
            windows = windows or windows_of(loaded)
            found.append(replace(row, **measure(loaded, windows, config, speed)))
        return found
    except (ConfigError, DataError) as error:
        if config.data is not None:
            raise
        print(f"no held-out losses: {error}", file=sys.stderr)
        return list(rows)


def measure(loaded: Loaded, windows: Windows, config: Comparing, speed: bool) -> dict[str, Any]:
    """Return a model's held-out loss, and with `speed` its speeds, as fields of a row. Raises as `evaluate` does."""
    check_memory(loaded.folder, num_parameters(loaded.config))
    keys = EvaluateConfig(
        path=str(loaded.folder),
        data=config.data,
        batch_size=BATCH_SIZE,
        max_batches=config.max_batches,
        device=config.device,
    )
    if pairs := find_pairs(keys, loaded):
        raise ConfigError(f"{pairs.name} has preference pairs, which have no loss of a text; give data=<a text file>")
    if speed:  # the first batches of a process are slower, whichever model reads them
        evaluate_loss(replace(keys, max_batches=1), loaded, windows=windows)
    found = evaluate_loss(keys, loaded, windows=windows)
    if not speed:
        return {"loss": found["loss"]}
    return {
        "loss": found["loss"],
        "read_per_s": found["tokens"] / max(found["seconds"], 1e-9),
        "written_per_s": writing_speed(loaded, config.device),
    }


def writing_speed(loaded: Loaded, device: str) -> float:
    """Return the tokens a second of greedy sampling, without the time of the first tokens."""
    model = loaded.build(device_by_name(device))
    count = min(WRITTEN, loaded.config.max_seq_len - 1)
    tokens = generate(model, [0], max_new_tokens=count, temperature=0)
    for _ in range(count // 2):
        next(tokens)
    started = time.perf_counter()
    return sum(1 for _ in tokens) / max(time.perf_counter() - started, 1e-9)


def check_memory(folder: Path, parameters: int) -> None:
    """Refuse to load a model that does not fit the memory. Raises ConfigError with the remedy."""
    needed, free = int(4 * ROOM * parameters), psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"{folder} needs about {needed:,} bytes of memory to compare, and {free:,} are free; compare=false leaves "
            "it out"
        )


def print_comparison(out: Path, rows: Sequence[Row], **more: Any) -> None:
    """Print the table; where standard output is no terminal, on standard error, and JSON on standard output."""
    to_terminal = sys.stdout.isatty()
    lines = table(rows)
    print("\n".join(lines), file=sys.stdout if to_terminal else sys.stderr, flush=True)
    if not to_terminal:
        models = [asdict(row) for row in rows]
        print(json.dumps({"out": str(out), "models": models, **more}), flush=True)


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table, in aligned columns; those of the speeds only if they were measured."""
    fast = any(row.read_per_s is not None for row in rows)
    cells = [["model", "bytes of weights", "held-out loss", *(["tokens/s read", "tokens/s written"] if fast else [])]]
    for row in rows:
        name = row.name if row.step is None else f"{row.name} (step {row.step})"
        loss = "unknown" if row.loss is None else f"{row.loss:.6f}"
        speeds = ["unknown" if s is None else f"{s:,.0f}" for s in (row.read_per_s, row.written_per_s)] if fast else []
        cells.append([name, f"{row.bytes:,}", loss, *speeds])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]
