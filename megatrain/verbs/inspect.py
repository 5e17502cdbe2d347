"""`megatrain inspect`: what a run, a checkpoint or a prepared dataset holds, every checksum verified. Changes nothing.

Everything that can be read is printed first; what is damaged then ends the command with its error and exit code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatrain.checkpoint.manifest import MANIFEST, Manifest, check_coverage, read_manifest, verify_file
from megatrain.checkpoint.naming import list_checkpoints
from megatrain.config import InspectConfig
from megatrain.data.card import Card
from megatrain.data.indexed_dataset import verify_dataset
from megatrain.data.tokenizer import META
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.interop.load_model import checkpoints_folder, kind_of
from megatrain.model.formats import DTYPE_BYTES
from megatrain.tracking.console import short
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import iter_metrics

HIGHLIGHTS = (
    "model.name",
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.num_kv_heads",
    "model.vocab_size",
    "model.max_seq_len",
    "data.name",
    "train.steps",
    "train.global_batch_size",
    "train.seq_len",
    "optim.lr",
    "optim.schedule",
    "precision.name",
    "seed",
)
"""Config keys worth seeing at a glance."""


def inspect(config: InspectConfig) -> None:
    """Print what the path holds.

    Raises:
        ConfigError: nothing of ours is there.
        CheckpointError, DataError: something in it is damaged, by name; raised after everything was printed.
    """
    path = Path(config.path)
    page = Page()
    kind = kind_of(path)
    if kind == "dataset":
        show_dataset(page, path)
    elif kind == "checkpoint":
        finish(show_checkpoint(page, path))
    elif kind == "run":
        show_run(page, path)
    elif kind == "huggingface":
        raise ConfigError(f"path={path} is a Hugging Face folder; megatrain import turns it into a checkpoint")
    else:
        raise ConfigError(f"path={path} is neither a run folder, nor a checkpoint, nor a prepared dataset")


def finish(problems: list[str]) -> None:
    """End with exit code 4 if there are any problems."""
    if problems:
        raise CheckpointError("; ".join(problems))


# ---------------------------------------------------------------------------------------------------- checkpoints


@dataclass
class Checkup:
    """A checkpoint's manifest (None if it cannot be read), a verdict for each file, and all that is wrong."""

    manifest: Manifest | None = None
    verdicts: dict[str, str | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """In a word, or the first of what is wrong."""
        return self.problems[0] if self.problems else "valid"


def check(folder: Path) -> Checkup:
    """Verify everything in a checkpoint folder and go on where something is wrong."""
    found = Checkup()
    try:
        found.manifest = read_manifest(folder)
        for name, recorded in sorted(found.manifest.files.items()):
            found.verdicts[name] = verify_file(folder, name, recorded)
        check_coverage(folder, found.manifest)
    except CheckpointError as error:
        found.problems.append(str(error))
    found.problems += [problem for problem in found.verdicts.values() if problem]
    if (folder / "tokenizer" / META).is_file():
        try:
            load_tokenizer(folder / "tokenizer")
        except DataError as error:
            found.problems.append(str(error))
    return found


def show_checkpoint(page: Page, folder: Path) -> list[str]:
    """Print a checkpoint; returns what is wrong with it."""
    found = check(folder)
    page.title(f"checkpoint {folder}")
    if found.manifest:
        page.facts(checkpoint_facts(found.manifest))
        page.table("tensors", ("kind", "dtype", "tensors", "elements", "bytes"), tensor_rows(found.manifest))
        page.table("config", ("key", "value"), highlights(found.manifest.identity.config))
    page.table("files", ("file", "bytes", "checksum"), file_rows(folder, found))
    page.facts({"verdict": "damaged" if found.problems else "valid: every checksum matches"})
    return found.problems


def checkpoint_facts(manifest: Manifest) -> dict[str, Any]:
    """Where the run stood, and what wrote it."""
    progress, identity, optimizer = manifest.progress, manifest.identity, manifest.counters.optimizer
    parameters = sum(math.prod(tensor.shape) for name, tensor in manifest.tensors.items() if name.startswith("model."))
    return {
        "step": progress.step,
        "tokens": f"{progress.tokens:,}",
        "cursor (samples)": f"{progress.cursor:,}",
        "skip ranges": [list(skipped) for skipped in progress.skip_ranges] or "none",
        "optimizer steps": optimizer.step if optimizer else "none: weights alone",
        "parameters": f"{parameters:,}",
        "engine": identity.engine or "none",
        "layout": " ".join(f"{name}={value}" for name, value in (identity.layout or {}).items()) or "none",
        "dataset": identity.dataset_fingerprint or "none",
        "imported from": identity.imported_from,
    }


def tensor_rows(manifest: Manifest) -> list[list[str]]:
    """Tensors counted by kind and dtype."""
    counts: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    for name, tensor in manifest.tensors.items():
        parts = name.split(".")
        kind = ".".join(parts[:2]) if parts[0] == "optim" else parts[0]
        counts[kind, tensor.dtype] += 1
        elements[kind, tensor.dtype] += math.prod(tensor.shape)
    return [
        [
            kind,
            dtype,
            f"{count:,}",
            f"{elements[kind, dtype]:,}",
            f"{elements[kind, dtype] * DTYPE_BYTES.get(dtype, 0):,}",
        ]
        for (kind, dtype), count in counts.items()
    ]


def file_rows(folder: Path, found: Checkup) -> list[list[str]]:
    """The files on the disk and those the manifest lists."""
    rows = []
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted(there | found.verdicts.keys()):
        size = f"{(folder / name).stat().st_size:,}" if name in there else "missing"
        if name == MANIFEST:
            verdict = "ok" if found.manifest else "damaged"
        elif name in found.verdicts:
            verdict = "damaged" if found.verdicts[name] else "ok"
        else:
            verdict = "not listed in the manifest" if found.manifest else "unknown"
        rows.append([name, size, verdict])
    return rows


def highlights(config: dict[str, Any]) -> list[list[str]]:
    """The config's keys worth seeing, those that are there."""
    rows = []
    for name in HIGHLIGHTS:
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            rows.append([name, str(value)])
    return rows


# ---------------------------------------------------------------------------------------------------- runs


def show_run(page: Page, run: Path) -> None:
    """Print a run: its checkpoints, where a resume would go on, its last metrics and its events."""
    page.title(f"run {run}")
    folder = checkpoints_folder(run)
    found = {path: check(path) for path in list_checkpoints(folder)}
    problems = [problem for checkup in found.values() for problem in checkup.problems]
    newest = next((path for path, checkup in found.items() if not checkup.problems), None)
    if newest is not None and (manifest := found[newest].manifest) is not None:
        page.table("config", ("key", "value"), highlights(manifest.identity.config))
    rows = [[path.name, f"{tokens_of(c)}", f"{size_of(path):,}", c.verdict] for path, c in found.items()]
    page.table("checkpoints", ("checkpoint", "tokens", "bytes", "verdict"), rows)
    for path in sorted(folder.glob("*.writing")):
        page.line(f"unfinished: {path.name} (a save in progress, or one that was cut short; no checkpoint)")
    if found:
        page.facts({"a resume takes": newest.name if newest else "none: all are damaged"})
    else:
        page.facts({"a resume takes": "none: there is no checkpoint, so the run would start at its first step"})
    problems += show_records(page, run)
    if (run / "tokenizer").is_dir():
        try:
            tokenizer = load_tokenizer(run / "tokenizer")
            page.facts({"tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, {tokenizer.fingerprint}"})
        except (ConfigError, DataError) as error:
            problems.append(str(error))
            page.facts({"tokenizer": "damaged"})
    finish(problems)


def show_records(page: Page, run: Path) -> list[str]:
    """Print the last metrics and the events; returns what cannot be read."""
    problems = []
    if (run / "metrics.jsonl").is_file():
        try:
            last: dict[str, Any] = {}
            heldout = None
            for last in iter_metrics(run / "metrics.jsonl"):
                heldout = last.get("heldout_loss") or heldout
            shown = {name: last.get(name) for name in ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s")}
            page.table("last metrics", ("metric", "value"), [[k, number(v)] for k, v in shown.items()])
            if heldout is not None:
                page.facts({"last held-out loss": number(heldout)})
        except DataError as error:
            problems.append(str(error))
    if (run / "events.jsonl").is_file():
        events = read_events(run / "events.jsonl")
        last_of = {event["kind"]: event for event in events}
        rows = [
            [kind, str(count), str(last_of[kind].get("step")), str(last_of[kind].get("time"))]
            for kind, count in Counter(event["kind"] for event in events).items()
        ]
        page.table("events", ("kind", "times", "last step", "last time"), rows)
    return problems


def tokens_of(checkup: Checkup) -> str:
    """Tokens a checkpoint's run had seen, shortened."""
    return short(checkup.manifest.progress.tokens) if checkup.manifest else "?"


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def number(value: Any) -> str:
    """A metric in a few digits."""
    return f"{value:.6g}" if isinstance(value, float) else f"{value}"


# ---------------------------------------------------------------------------------------------------- datasets


def show_dataset(page: Page, folder: Path) -> None:
    """Print a prepared dataset's card, then verify every hash."""
    card = Card.load(folder)
    page.title(f"dataset {folder}")
    page.facts({"name": card.name, "fingerprint": card.fingerprint})
    rows = [
        [name, f"{s.documents:,}", f"{s.bytes:,}" if s.bytes is not None else "unknown", f"{s.tokens:,}", s.dtype]
        for name, s in card.splits.items()
    ]
    page.table("splits", ("split", "documents", "bytes", "tokens", "dtype"), rows)
    if card.tokenizer:
        page.table("tokenizer", ("key", "value"), [[k, str(v)] for k, v in vars(card.tokenizer).items()])
    page.table("source", ("key", "value"), [[k, str(v)] for k, v in {**card.source, **card.counts}.items()])
    try:
        verify_dataset(folder)
    except (ConfigError, DataError) as error:
        page.facts({"verdict": "damaged"})
        raise DataError(str(error)) from error
    page.facts({"verdict": "valid: every checksum matches"})


# ---------------------------------------------------------------------------------------------------- printing


class Page:
    """Prints rich tables on a terminal and plain, aligned columns elsewhere."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)

    def title(self, text: str) -> None:
        """The headline."""
        self._console.print(Text(text, style="bold"))

    def line(self, text: str) -> None:
        """One line as it is."""
        self._console.print(Text(text))

    def facts(self, values: dict[str, Any]) -> None:
        """A line for each value that is not None."""
        for name, value in values.items():
            if value is not None:
                self.line(f"{name}: {value}")

    def table(self, title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
        """A table; nothing where there are no rows."""
        if not rows:
            return
        if self._console.is_terminal:
            table = Table(title=Text(title), title_justify="left")
            for column in columns:
                table.add_column(column, overflow="fold")
            for row in rows:
                table.add_row(*map(Text, row))
            self._console.print(table, soft_wrap=False)
            return
        widths = [max(len(row[index]) for row in [list(columns), *rows]) for index in range(len(columns))]
        self.line(f"{title}:")
        for row in [list(columns), *rows]:
            self.line("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
