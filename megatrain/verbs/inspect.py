"""`megatrain inspect`: print what a run or another folder of megatrain holds and verify every checksum. Read-only.

Everything readable is printed first. Any damage then ends the command with its error and exit code.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatrain.checkpoint import lineage
from megatrain.checkpoint.manifest import MANIFEST, Manifest, check_coverage, read_manifest, verify_file
from megatrain.checkpoint.naming import list_checkpoints
from megatrain.checkpoint.resume import model_sizes
from megatrain.config import InspectConfig
from megatrain.config.flatten import flatten
from megatrain.config.model_config import ROPE_SCALING_KEYS
from megatrain.config.plain import plain
from megatrain.data.mixture import seen_shares
from megatrain.data.tokenizer import META
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.interop.path_kind import checkpoints_folder, find_checkpoint, kind_of
from megatrain.model.formats import DTYPE_BYTES
from megatrain.resilience.owner import is_held
from megatrain.tracking.console import short
from megatrain.tracking.event_words import change, details, part_read
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import iter_metrics
from megatrain.verbs.inspect_data import print_dataset, print_gguf, print_huggingface, print_tokenizer
from megatrain.verbs.printer import Printer

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

FIGURES = {
    "step": "step",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens": "tokens",
    "tokens_per_s": "tokens/s",
}
"""Figures of metrics.jsonl to print, and their names."""

SHOWN = 6
"""Most folders that a message lists."""

MAX_CELL = 80
"""Most characters of an event's details in the table."""

MIXTURE_COLUMNS = ("source", "samples", "share", "weight now", "epochs")


def inspect(config: InspectConfig) -> None:
    """Print what the path holds.

    Raises:
        ConfigError: the path is none of what can be inspected, or the run has no checkpoint of `step`.
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
        print_huggingface(printer, path)
    elif (path / META).is_file():
        print_tokenizer(printer, path)
    elif path.suffix == ".gguf" and path.is_file():
        print_gguf(printer, path)
    else:
        raise ConfigError(
            f"path={path} is not a run folder, a checkpoint, a prepared dataset, a tokenizer or a Hugging Face folder; "
            f"give one of these{inside(path)}"
        )


def inside(path: Path) -> str:
    """Return which folders in a folder can be inspected, as the end of a message."""
    children = sorted(path.iterdir()) if path.is_dir() else []
    found = [str(child) for child in children if child.is_dir() and kind_of(child) != "unknown"]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f", such as {', '.join(found[:SHOWN])}{more}" if found else ""


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
        printer.table("where it came from", lineage.COLUMNS, lineage.rows(lineage.line_of(folder, found.manifest)))
        printer.table("made from", ("model", "step", "weight", "fingerprint"), origin_rows(found.manifest))
        printer.table("mixture", MIXTURE_COLUMNS, mixture_rows(found.manifest))
        printer.table("tensors", ("kind", "dtype", "tensors", "elements", "bytes"), tensor_rows(found.manifest))
        printer.table("config", ("key", "value"), highlights(found.manifest.identity.config))
    printer.table("files", ("file", "bytes", "checksum"), file_rows(folder, found))
    printer.facts({"verdict": "damaged" if found.problems else "valid: every checksum matches"})
    return found.problems


def checkpoint_facts(manifest: Manifest) -> dict[str, Any]:
    """Return the run's position and what wrote the checkpoint."""
    progress, identity, optimizer = manifest.progress, manifest.identity, manifest.counters.optimizer
    counted = {"model": 1, "int8": 1, "int4": 2}  # weights an element
    parameters = sum(
        math.prod(tensor.shape) * counted.get(name.partition(".")[0], 0) for name, tensor in manifest.tensors.items()
    )
    return {
        "step": progress.step,
        "tokens": f"{progress.tokens:,}",
        "cursor (samples)": f"{progress.cursor:,}",
        "skip ranges": ", ".join(f"{start:,} to {stop:,}" for start, stop in progress.skip_ranges) or "none",
        "changed on a resume": "; ".join(
            f"{o.key} {change(o.before, o.now)} (step {o.step})" for o in identity.overrides
        )
        or None,
        "optimizer steps": optimizer.step if optimizer else "none: weights alone",
        "parameters": f"{parameters:,}",
        "engine": identity.engine or "none",
        "layout": " ".join(f"{name}={value}" for name, value in (identity.layout or {}).items()) or "none",
        "dataset": identity.dataset_fingerprint or "none",
        "imported from": identity.imported_from,
        "made by": made_by(manifest),
        "began from": identity.origin,
    }


def made_by(manifest: Manifest) -> str | None:
    """Return the verb and the settings that made a merged or compressed model, as they are typed; else None."""
    made = manifest.identity.made_from
    words = [f"{name}={plain(value)}" for name, value in made.items() if name not in ("verb", "sources")]
    return " ".join([f"megatrain {made['verb']}", *words]) if made else None


def origin_rows(manifest: Manifest) -> list[list[str]]:
    """Return a row for each model that a merged or compressed one was made from."""
    return [
        [
            str(source.get("path")),
            plain(source.get("step")),
            plain(source.get("weight"), 6) if "weight" in source else "",
            str(source.get("fingerprint")),
        ]
        for source in manifest.identity.made_from.get("sources", [])
    ]


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
    """Return the keys that the model uses, sizes of null resolved, and the keys of HIGHLIGHTS that the config has."""
    flat = flatten(config) | model_sizes(config)
    read = {f"model.{name}" for name in ROPE_SCALING_KEYS.get(flat.get("model.rope_scaling"), ())}
    idle = {f"model.{name}" for names in ROPE_SCALING_KEYS.values() for name in names} - read
    if not flat.get("model.qk_norm"):
        idle.add("model.qk_norm_over")
    if flat.get("model.position") != "rope":
        idle.add("model.rope_theta")
    model = [name for name in flat if name.startswith("model.") and name not in idle]
    return [[name, plain(flat[name])] for name in (*model, *HIGHLIGHTS) if flat.get(name) is not None]


# ---------------------------------------------------------------------------------------------------- runs


def print_run(printer: Printer, run: Path) -> None:
    """Print a run: how it stands, its checkpoints and which a resume would load, its events, and its config."""
    printer.title(f"run {run}")
    folder = checkpoints_folder(run)
    found = {path: inspect_checkpoint(path) for path in list_checkpoints(folder)}
    problems = [problem for inspection in found.values() for problem in inspection.problems]
    newest = next((path for path, inspection in found.items() if not inspection.problems), None)
    manifest = found[newest].manifest if newest else None
    events = read_events(run / "events.jsonl") if (run / "events.jsonl").is_file() else []
    facts: dict[str, Any] = {"status": status(run, events)}
    try:
        facts |= last_figures(run / "metrics.jsonl", events)
    except DataError as error:
        problems.append(str(error))
    facts["weights taken from"] = next((details(event) for event in events if event["kind"] == "init_from"), None)
    if (run / "tokenizer").is_dir():
        try:
            tokenizer = load_tokenizer(run / "tokenizer")
            facts["tokenizer"] = f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, {tokenizer.fingerprint}"
        except (ConfigError, DataError) as error:
            problems.append(str(error))
            facts["tokenizer"] = "damaged"
    if newest:
        facts["a resume takes"] = newest.name
    else:
        why = "all are damaged" if found else "there is no checkpoint, so the run would start at its first step"
        facts["a resume takes"] = f"none: {why}"
    printer.facts(facts)
    rows = [[path.name, f"{format_tokens(c)}", f"{folder_bytes(path):,}", c.verdict] for path, c in found.items()]
    printer.table("checkpoints", ("checkpoint", "tokens", "bytes", "verdict"), rows)
    for path in sorted(folder.glob("*.writing")):
        printer.line(f"unfinished: {path.name} (a save in progress, or one that was cut short; no checkpoint)")
    printer.table("events", ("kind", "times", "last step", "last time", "last one"), event_rows(events))
    if newest and manifest:
        printer.table("where it came from", lineage.COLUMNS, lineage.rows(lineage.line_of(newest, manifest)))
        printer.table("mixture", MIXTURE_COLUMNS, mixture_rows(manifest))
        printer.table("config", ("key", "value"), highlights(manifest.identity.config))
    raise_problems(problems)


def status(run: Path, events: list[dict[str, Any]]) -> str:
    """Return how a run stands: the end that it recorded, or whether its job runs."""
    last = next((event for event in reversed(events) if event["kind"] in ("start", "resume", "stop")), None)
    if is_held(run):
        return "running"
    if last is None:
        return "not started"
    return plain(last.get("status")) if last["kind"] == "stop" else "no end recorded"


def last_figures(path: Path, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the last step in metrics.jsonl and the last held-out loss. Raises DataError if damaged."""
    last: dict[str, Any] = {}
    evaluated: dict[str, Any] = {}
    for last in iter_metrics(path) if path.is_file() else ():
        evaluated = last if last.get("heldout_loss") is not None else evaluated
    if not last:
        return {}
    facts = {name: format_number(last[key]) for key, name in FIGURES.items() if last.get(key) is not None}
    if evaluated:
        step = evaluated["step"]
        parts = [part_read(event) for event in events if event["kind"] == "evaluate" and event.get("step") == step]
        read = f" ({parts[-1]})" if parts and parts[-1] else ""
        facts["held-out loss"] = f"{format_number(evaluated['heldout_loss'])} at step {step:,}{read}"
    return facts


def event_rows(events: list[dict[str, Any]]) -> list[list[str]]:
    """Return a row for each kind of events: how many, and the last one."""
    counts = Counter(event["kind"] for event in events)
    last_of = {event["kind"]: event for event in events}
    return [
        [
            kind.replace("_", " "),
            f"{counts[kind]:,}",
            plain(event.get("step")),
            clock_time(event.get("time")),
            shortened(event),
        ]
        for kind, event in last_of.items()
    ]


def clock_time(moment: Any) -> str:
    """Return an event's time without fractions of a second: `2026-11-30 11:59:24Z`."""
    return re.sub(r"T([\d:]+)(\.\d+)?", r" \1", str(moment))


def shortened(event: dict[str, Any]) -> str:
    """Return an event's details in a table's cell."""
    text = details(event)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."


def format_tokens(inspection: Inspection) -> str:
    """Return the tokens trained on up to a checkpoint, abbreviated."""
    return short(inspection.manifest.progress.tokens) if inspection.manifest else "?"


def folder_bytes(folder: Path) -> int:
    """Return the total size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def format_number(value: Any) -> str:
    """Return a figure with six significant digits, integers with separators."""
    if isinstance(value, float) and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else plain(value, 6)
