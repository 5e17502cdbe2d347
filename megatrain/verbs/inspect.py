"""`megatrain inspect`: print what a run, a checkpoint or a prepared dataset holds and verify every checksum. Read-only.

Everything readable is printed first. Any damage then ends the command with its error and exit code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import category

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatrain.checkpoint.manifest import MANIFEST, Manifest, check_coverage, read_manifest, verify_file
from megatrain.checkpoint.naming import list_checkpoints
from megatrain.checkpoint.resume import model_sizes
from megatrain.config import InspectConfig
from megatrain.config.flatten import flatten
from megatrain.data.card import Card
from megatrain.data.funnel import funnel
from megatrain.data.indexed_dataset import verify_dataset
from megatrain.data.mixture import seen_shares
from megatrain.data.packing_index import stored_packings, verify_packings
from megatrain.data.tokenizer import META
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.interop.load_model import checkpoints_folder, find_checkpoint, kind_of
from megatrain.model.formats import DTYPE_BYTES
from megatrain.report.dataset_page import sample_texts
from megatrain.tracking.console import short
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import iter_metrics

HIGHLIGHTS = (
    "data.name",
    "train.steps",
    "train.global_batch_size",
    "train.seq_len",
    "optim.lr",
    "optim.schedule",
    "precision.name",
    "seed",
)
"""Config keys to print after those of the model."""

MIXTURE_COLUMNS = ("source", "samples", "share", "weight now", "epochs")


def inspect(config: InspectConfig) -> None:
    """Print what the path holds.

    Raises:
        ConfigError: the path is not a run, a checkpoint or a prepared dataset, or the run has no checkpoint of `step`.
        CheckpointError, DataError: a file is damaged. Raised after everything was printed; names the files.
    """
    path = Path(config.path)
    if config.step is not None:
        path = find_checkpoint(path, config.step)
    printer = Printer()
    kind = kind_of(path)
    if kind == "dataset":
        print_dataset(printer, path, config.samples, config.seed)
    elif kind == "checkpoint":
        raise_problems(print_checkpoint(printer, path))
    elif kind == "run":
        print_run(printer, path)
    elif kind == "huggingface":
        raise ConfigError(
            f"path={path} is a Hugging Face folder; turn it into a checkpoint with megatrain import, or give a run"
        )
    else:
        raise ConfigError(f"path={path} is not a run folder, a checkpoint or a prepared dataset; give one of these")


def raise_problems(problems: list[str]) -> None:
    """Raise a CheckpointError that lists the problems, if there are any."""
    if problems:
        raise CheckpointError("; ".join(problems))


# ---------------------------------------------------------------------------------------------------- checkpoints


@dataclass
class Inspection:
    """A checkpoint's manifest (None if it cannot be read), a verdict for each file, and all that is wrong."""

    manifest: Manifest | None = None
    verdicts: dict[str, str | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """`valid`, or the first problem."""
        return self.problems[0] if self.problems else "valid"


def inspect_checkpoint(folder: Path) -> Inspection:
    """Verify everything in a checkpoint folder and collect the problems."""
    found = Inspection()
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


def print_checkpoint(printer: Printer, folder: Path) -> list[str]:
    """Print a checkpoint and return its problems."""
    found = inspect_checkpoint(folder)
    printer.title(f"checkpoint {folder}")
    if found.manifest:
        printer.facts(checkpoint_facts(found.manifest))
        printer.table("mixture", MIXTURE_COLUMNS, mixture_rows(found.manifest))
        printer.table("tensors", ("kind", "dtype", "tensors", "elements", "bytes"), tensor_rows(found.manifest))
        printer.table("config", ("key", "value"), highlights(found.manifest.identity.config))
    printer.table("files", ("file", "bytes", "checksum"), file_rows(folder, found))
    printer.facts({"verdict": "damaged" if found.problems else "valid: every checksum matches"})
    return found.problems


def checkpoint_facts(manifest: Manifest) -> dict[str, Any]:
    """Return the run's position and what wrote the checkpoint."""
    progress, identity, optimizer = manifest.progress, manifest.identity, manifest.counters.optimizer
    parameters = sum(math.prod(tensor.shape) for name, tensor in manifest.tensors.items() if name.startswith("model."))
    return {
        "step": progress.step,
        "tokens": f"{progress.tokens:,}",
        "cursor (samples)": f"{progress.cursor:,}",
        "skip ranges": [list(skipped) for skipped in progress.skip_ranges] or "none",
        "changed on a resume": "; ".join(f"{o.key} {o.before} → {o.now} (step {o.step})" for o in identity.overrides)
        or None,
        "optimizer steps": optimizer.step if optimizer else "none: weights alone",
        "parameters": f"{parameters:,}",
        "engine": identity.engine or "none",
        "layout": " ".join(f"{name}={value}" for name, value in (identity.layout or {}).items()) or "none",
        "dataset": identity.dataset_fingerprint or "none",
        "imported from": identity.imported_from,
    }


def mixture_rows(manifest: Manifest) -> list[list[str]]:
    """Return a row for each source of a mixture: what the run has seen of it, without skipped samples."""
    plan, progress = manifest.identity.mixture, manifest.progress
    if plan is None:
        return []
    return [
        [name, f"{seen['samples']:,}", f"{seen['share']:.4%}", f"{seen['weight']:.4%}", f"{seen['epochs']:.3f}"]
        for name, seen in seen_shares(plan, progress.cursor, progress.skip_ranges).items()
    ]


def tensor_rows(manifest: Manifest) -> list[list[str]]:
    """Return a row for each kind and dtype of tensors, with their number and size."""
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


def file_rows(folder: Path, found: Inspection) -> list[list[str]]:
    """Return a row for each file that is on the disk or listed in the manifest."""
    rows = []
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted(present | found.verdicts.keys()):
        size = f"{(folder / name).stat().st_size:,}" if name in present else "missing"
        if name == MANIFEST:
            verdict = "ok" if found.manifest else "damaged"
        elif name in found.verdicts:
            verdict = "damaged" if found.verdicts[name] else "ok"
        else:
            verdict = "not listed in the manifest" if found.manifest else "unknown"
        rows.append([name, size, verdict])
    return rows


def highlights(config: dict[str, Any]) -> list[list[str]]:
    """Return every key of the model, sizes of null resolved, and the keys of HIGHLIGHTS that the config has."""
    flat = flatten(config) | model_sizes(config)
    model = [name for name in flat if name.startswith("model.")]
    return [[name, str(flat[name])] for name in (*model, *HIGHLIGHTS) if flat.get(name) is not None]


# ---------------------------------------------------------------------------------------------------- runs


def print_run(printer: Printer, run: Path) -> None:
    """Print a run: its checkpoints, which of them a resume would load, its last metrics and its events."""
    printer.title(f"run {run}")
    folder = checkpoints_folder(run)
    found = {path: inspect_checkpoint(path) for path in list_checkpoints(folder)}
    problems = [problem for inspection in found.values() for problem in inspection.problems]
    newest = next((path for path, inspection in found.items() if not inspection.problems), None)
    if newest is not None and (manifest := found[newest].manifest) is not None:
        printer.table("config", ("key", "value"), highlights(manifest.identity.config))
        printer.table("mixture", MIXTURE_COLUMNS, mixture_rows(manifest))
    rows = [[path.name, f"{format_tokens(c)}", f"{folder_bytes(path):,}", c.verdict] for path, c in found.items()]
    printer.table("checkpoints", ("checkpoint", "tokens", "bytes", "verdict"), rows)
    for path in sorted(folder.glob("*.writing")):
        printer.line(f"unfinished: {path.name} (a save in progress, or one that was cut short; no checkpoint)")
    if found:
        printer.facts({"a resume takes": newest.name if newest else "none: all are damaged"})
    else:
        printer.facts({"a resume takes": "none: there is no checkpoint, so the run would start at its first step"})
    problems += print_records(printer, run)
    if (run / "tokenizer").is_dir():
        try:
            tokenizer = load_tokenizer(run / "tokenizer")
            printer.facts({"tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, {tokenizer.fingerprint}"})
        except (ConfigError, DataError) as error:
            problems.append(str(error))
            printer.facts({"tokenizer": "damaged"})
    raise_problems(problems)


def print_records(printer: Printer, run: Path) -> list[str]:
    """Print the last metrics and the events, and return the problems."""
    problems = []
    if (run / "metrics.jsonl").is_file():
        try:
            last: dict[str, Any] = {}
            heldout = None
            for last in iter_metrics(run / "metrics.jsonl"):
                heldout = last.get("heldout_loss") or heldout
            shown = {name: last.get(name) for name in ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s")}
            printer.table("last metrics", ("metric", "value"), [[k, format_number(v)] for k, v in shown.items()])
            if heldout is not None:
                printer.facts({"last held-out loss": format_number(heldout)})
        except DataError as error:
            problems.append(str(error))
    if (run / "events.jsonl").is_file():
        events = read_events(run / "events.jsonl")
        last_of = {event["kind"]: event for event in events}
        rows = [
            [kind, str(count), str(last_of[kind].get("step")), str(last_of[kind].get("time"))]
            for kind, count in Counter(event["kind"] for event in events).items()
        ]
        printer.table("events", ("kind", "times", "last step", "last time"), rows)
    return problems


def format_tokens(inspection: Inspection) -> str:
    """Return the tokens trained on up to a checkpoint, abbreviated."""
    return short(inspection.manifest.progress.tokens) if inspection.manifest else "?"


def folder_bytes(folder: Path) -> int:
    """Return the total size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def format_number(value: Any) -> str:
    """Return a metric with six significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else f"{value}"


# ---------------------------------------------------------------------------------------------------- datasets


def print_dataset(printer: Printer, folder: Path, num_samples: int, seed: int) -> None:
    """Print a prepared dataset's card, verify every hash, and print random documents."""
    card = Card.load(folder)
    printer.title(f"dataset {folder}")
    printer.facts({"name": card.name, "fingerprint": card.fingerprint})
    rows = [
        [name, f"{s.documents:,}", f"{s.bytes:,}" if s.bytes is not None else "unknown", f"{s.tokens:,}", s.dtype]
        for name, s in card.splits.items()
    ]
    printer.table("splits", ("split", "documents", "bytes", "tokens", "dtype"), rows)
    if card.tokenizer:
        printer.table("tokenizer", ("key", "value"), [[k, str(v)] for k, v in vars(card.tokenizer).items()])
    printer.table("from records to documents", FUNNEL_COLUMNS, funnel_rows(card))
    printer.table("source", ("key", "value"), [[k, str(v)] for k, v in {**card.source, **card.counts}.items()])
    printer.table("packings", PACKING_COLUMNS, packing_rows(folder, card))
    try:
        verify_dataset(folder)
        verify_packings(folder)
    except (ConfigError, DataError) as error:
        printer.facts({"verdict": "damaged"})
        raise DataError(str(error)) from error
    for headline, text in sample_texts(folder, card, num_samples, seed, SAMPLE_TOKENS):
        printer.title(headline)
        printer.line(printable(text))
    printer.facts({"verdict": "valid: every checksum matches"})


PACKING_COLUMNS = ("split", "seq_len", "samples", "padding", "documents cut", "cut by concatenate")


def packing_rows(folder: Path, card: Card) -> list[list[str]]:
    """Return a row for each packing of a dataset that training has made: the shares of padding and of cut documents."""
    return [
        [
            packing.split,
            f"{packing.seq_len:,}",
            f"{packing.samples:,}",
            *(f"{packing.figures[name]:.4%}" for name in ("padding_share", "cut_share", "cut_share_of_windows")),
        ]
        for packing in stored_packings(folder)
        if packing.fingerprint == card.fingerprint
    ]


FUNNEL_COLUMNS = (
    "stage",
    "documents in",
    "removed",
    "documents left",
    "bytes left",
    "changed",
    "removed for",
    "counted",
)
SAMPLE_TOKENS = 150
"""Tokens printed of a random document at most."""


def funnel_rows(card: Card) -> list[list[str]]:
    """Return a row for each stage from the records that were read to the documents that are kept."""
    return [
        [
            stage.name,
            f"{stage.documents_in:,}",
            f"{stage.removed:,}",
            f"{stage.documents_out:,}",
            "" if stage.bytes_out is None else f"{stage.bytes_out:,}",
            f"{stage.changed:,}" if stage.is_step else "",
            largest(stage.reasons),
            largest(stage.changes),
        ]
        for stage in funnel(card)
    ]


def largest(counts: dict[str, int], limit: int = 5) -> str:
    """Return the largest counts as text, and how many others there are."""
    listed = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{name} {count:,}" for name, count in listed[:limit]]
    return ", ".join([*shown, *([f"{len(listed) - limit} others"] if len(listed) > limit else [])])


def printable(text: str) -> str:
    """Return text that cannot steer a terminal: control and invisible characters except newline and tab as escapes."""
    return "".join(c if c in "\n\t" or category(c)[0] != "C" else c.encode("unicode_escape").decode() for c in text)


# ---------------------------------------------------------------------------------------------------- printing


class Printer:
    """Print rich tables on a terminal and plain, aligned columns elsewhere."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)

    def title(self, text: str) -> None:
        """Print a headline."""
        self._console.print(Text(text, style="bold"))

    def line(self, text: str) -> None:
        """Print one line as it is."""
        self._console.print(Text(text))

    def facts(self, values: dict[str, Any]) -> None:
        """Print `name: value` for each value that is not None."""
        for name, value in values.items():
            if value is not None:
                self.line(f"{name}: {value}")

    def table(self, title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
        """Print a table, or nothing if there are no rows."""
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
