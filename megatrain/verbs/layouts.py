"""`megatrain layouts`: print the legal layouts of a training job and the memory of a rank in each. Imports no torch.

`parallel/layout.py` decides what is legal, `planner/candidates.py` what to try, `planner/memory.py` what a rank holds.
This file fills in the open keys of the job, and sorts and prints the rows.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from megatrain.checkpoint.find import model_of, peek
from megatrain.config import LayoutsConfig, ModelConfig, TrainConfig
from megatrain.data.card import CARD, Card
from megatrain.errors import ConfigError
from megatrain.model.count import num_parameters
from megatrain.parallel.layout import Layout
from megatrain.parallel.rules import Refusal, explain
from megatrain.planner.candidates import SCHEDULES, Axes, Candidate, judge
from megatrain.planner.memory import KINDS, Memory, MemoryModel
from megatrain.verbs.places import require
from megatrain.verbs.value_checks import check_batches, check_loop

GIB = 2**30

AXIS_KEYS = {
    "engines": "engine.name",
    "zeros": "parallel.zero",
    "tps": "parallel.tp",
    "pps": "parallel.pp",
    "cps": "parallel.cp",
    "recomputes": "train.recompute",
    "cp_kinds": "parallel.cp_kind",
    "replicas": "parallel.dp_replicate",
}
"""The axes that a single key fixes. `parallel.schedule` and `parallel.virtual_stages` together fix one more."""

SIZES = ("train.global_batch_size", "train.micro_batch_size", "train.seq_len")
"""Keys of the job that the list assumes where they are not given."""

FULL = 0.85
"""Share of the usable memory above which a layout is nearly full: an estimate that is a little low would not do."""


@dataclass(frozen=True)
class Row:
    """One legal layout and the memory of its fullest rank."""

    candidate: Candidate
    layout: Layout
    memory: Memory

    def fits(self, limit: float | None) -> bool:
        """Return whether the layout's memory is within `limit` bytes; None means no limit."""
        return limit is None or self.memory.total <= limit

    def is_full(self, limit: float | None) -> bool:
        """Return whether the layout fits with little room to spare."""
        return limit is not None and FULL * limit < self.memory.total <= limit

    def overrides(self, job: TrainConfig) -> dict[str, Any]:
        """Return the keys of `megatrain train` that choose this layout, with their values."""
        c = self.candidate
        return {
            "train.global_batch_size": job.train.global_batch_size,
            "train.micro_batch_size": job.train.micro_batch_size,
            "train.seq_len": job.train.seq_len,
            "engine": c.engine,
            "parallel.tp": c.tp,
            "parallel.pp": c.pp,
            "parallel.cp": c.cp,
            "parallel.cp_kind": c.cp_kind,
            "parallel.zero": c.zero,
            "parallel.dp_replicate": c.dp_replicate,
            "parallel.schedule": c.schedule,
            "parallel.virtual_stages": c.virtual_stages,
            "train.recompute": c.recompute,
        }


def layouts(config: LayoutsConfig) -> None:
    """Print every legal layout. Raises ConfigError with the reasons if there is none."""
    world_size = config.launch.world_size or config.launch.nproc_per_node * (config.launch.num_nodes or 1)
    job, notes = fill_open_sizes(config, world_size)
    rows, refused = find_legal(job, world_size, open_axes(config))
    if not rows:
        raise ConfigError(explain_no_layout(config, job, world_size, refused))
    limit = usable_bytes(config)
    rows.sort(key=lambda row: _sort_key(row, limit))
    shown = select_rows(rows, config.layouts.limit)
    if config.layouts.format == "json":
        print(json.dumps([row_record(row, job, limit) for row in shown], indent=1))
    elif config.layouts.format == "csv":
        records = [row_record(row, job, limit) for row in shown]
        writer = csv.DictWriter(sys.stdout, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    else:
        print("\n".join(header_lines(config, job, world_size, notes, rows)), end="\n\n")
        print_table(shown, limit)
        if len(shown) < len(rows):
            print(
                f"\n{len(rows) - len(shown):,} more, layouts.limit=0 shows them; each engine and set of degrees "
                f"is shown once first, as far as the limit allows; any key that is given narrows the list"
            )
        if shown[0].fits(limit):
            print(f"\n{advice(shown[0], config, job, world_size)}")
        else:
            print("\nnone fits: use more ranks, smaller micro-batches or sequences, or optim.moments=bf16")


def usable_bytes(config: LayoutsConfig) -> float | None:
    """Return the bytes of a device that a layout may fill, or None if memory is ignored."""
    total = config.layouts.memory_gib
    return None if total is None else total * (1 - config.layouts.margin) * GIB


def advice(row: Row, config: LayoutsConfig, job: TrainConfig, world_size: int) -> str:
    """Return what to type for a layout: the keys that the command which asked for it does not have yet."""
    words = paste(row, config, job)
    lines = [f"for the first layout, start `megatrain train` with the same keys on {_ranks(world_size)} and add:"]
    lines = [*lines, f"  {words}"] if words else ["the first layout is what `megatrain train` takes with the same keys"]
    if assumed := [f"{key}={_value(job, key)}" for key in SIZES if _value(config, key) is None]:
        lines.append(f"assumed sizes: {' '.join(assumed)}; add them too, or give `megatrain layouts` those of your run")
    return "\n".join(lines)


def _ranks(number: int) -> str:
    return f"{number:,} rank{'s' * (number != 1)}"


def paste(row: Row, config: LayoutsConfig, job: TrainConfig) -> str:
    """Return the overrides that choose a layout, without those that are given, the default, or without effect in it."""
    c, usual = row.candidate, TrainConfig()
    idle = {
        "parallel.cp_kind": c.cp == 1,
        "parallel.dp_replicate": c.dp_replicate == 1,
        "parallel.schedule": c.pp == 1,
        "parallel.virtual_stages": c.pp == 1 or c.virtual_stages == 1,
    }
    words = []
    for key, value in row.overrides(job).items():
        name = "engine.name" if key == "engine" else key
        given = _value(config, name)
        if key not in SIZES and not idle.get(key) and value != (_value(usual, name) if given is None else given):
            words.append(f"{key}={value}")
    return " ".join(words)


def select_rows(rows: list[Row], limit: int) -> list[Row]:
    """Return at most `limit` rows (0: all) in their order, preferring one for each engine and set of degrees."""
    if not limit or len(rows) <= limit:
        return rows
    firsts: list[int] = []
    others: list[int] = []
    seen: set[tuple[str, int, int, int]] = set()
    for index, row in enumerate(rows):
        c = row.candidate
        key = (c.engine, c.tp, c.pp, c.cp)
        (others if key in seen else firsts).append(index)
        seen.add(key)
    return [rows[index] for index in sorted([*firsts, *others][:limit])]


# ---------------------------------------------------------------------------------------------------- the job


def _vocabulary(config: LayoutsConfig) -> tuple[int, str]:
    """Return the vocabulary's size and whose it is: that of the dataset if it is prepared, else the one to train."""
    folder = Path(config.data.dir) / (config.data.name or "")
    if config.data.name and (folder / CARD).is_file() and (maker := Card.load(folder).tokenizer):
        return maker.vocab_size, str(folder)
    return config.tokenizer.vocab_size, "tokenizer.vocab_size; a trained one may differ"


def fill_open_sizes(config: LayoutsConfig, world_size: int) -> tuple[TrainConfig, list[str]]:
    """Return the training job with its open sizes filled in, and notes that describe them.

    Raises ConfigError if its keys disagree.
    """
    job, notes = TrainConfig(), []
    _copy_given_keys(config, job)
    loop = job.train
    if config.model.vocab_size is None:
        job.model.vocab_size, whose = _vocabulary(config)
        notes.append(f"a vocabulary of {job.model.vocab_size:,} ({whose})")
    if config.train.seq_len is None:
        loop.seq_len = config.model.max_seq_len
        notes.append("sequences of model.max_seq_len")
    if config.train.micro_batch_size is None:
        loop.micro_batch_size = 1
        notes.append("micro-batches of one sequence")
    if config.train.global_batch_size is None:
        loop.global_batch_size = 2 * world_size * loop.micro_batch_size
        notes.append("steps of two micro-batches for each rank")
    check_loop(job)
    return job, notes


def _copy_given_keys(source: Any, target: Any) -> None:
    """Copy every non-null key that `target` has too, group by group."""
    for f in fields(target):
        value = getattr(source, f.name)
        if is_dataclass(value):
            _copy_given_keys(value, getattr(target, f.name))
        elif value is not None:
            setattr(target, f.name, value)


def open_axes(config: LayoutsConfig) -> Axes:
    """Return the axes to search. An axis whose key is given has only that value."""
    given = {axis: value for axis, key in AXIS_KEYS.items() if (value := _value(config, key)) is not None}
    schedule, virtual = config.parallel.schedule, config.parallel.virtual_stages
    pairs = [(name, virtual or usual) for name, usual in SCHEDULES if schedule in (None, name)]
    return Axes(
        schedules=tuple(pairs),
        without_pipeline=((schedule or "1f1b", virtual or 1),),
        **{axis: (value,) for axis, value in given.items()},
    )


def _value(config: Any, key: str) -> Any:
    """Return the value of a `group.name` key."""
    group, _, name = key.partition(".")
    return getattr(getattr(config, group), name)


# ---------------------------------------------------------------------------------------------------- search


def find_legal(job: TrainConfig, world_size: int, axes: Axes) -> tuple[list[Row], Counter[str]]:
    """Return the legal rows, and how many candidates each refusal ruled out."""
    model, rows, refused = MemoryModel(job.model, job.optim, teacher=_teacher(job)), [], Counter[str]()
    batches: dict[int, str | None] = {}
    for candidate, refusal, config in judge(job, world_size, axes):
        if refusal is not None:
            refused[refusal.name] += 1
            continue
        layout = Layout.of(config, world_size)
        if layout.dp not in batches:
            batches[layout.dp] = _batch_error(config, layout.dp)
        if (fault := batches[layout.dp]) is not None:
            refused[fault] += 1
        elif not _is_duplicate(candidate, layout, axes):
            rows.append(Row(candidate, layout, model.largest(config, layout)))
    return rows, refused


def _teacher(job: TrainConfig) -> ModelConfig | None:
    """Return the model of the job's teacher, if it is a run or a checkpoint. Raises ConfigError if it is another."""
    if job.method.teacher is None:
        return None
    require("method.teacher", Path(job.method.teacher))
    found = peek(Path(job.method.teacher))
    if found is None:
        raise ConfigError(
            f"method.teacher={job.method.teacher}: its size is read from a checkpoint; turn it into one first: "
            "megatrain import"
        )
    return model_of(*found)


def _is_duplicate(candidate: Candidate, layout: Layout, axes: Axes) -> bool:
    """Return whether the layout repeats one already listed: on one rank to shard over, native ZeRO stages are equal."""
    return candidate.engine == "native" and layout.dp * layout.cp == 1 and candidate.zero != axes.zeros[0]


def _batch_error(config: TrainConfig, dp: int) -> str | None:
    """Return why the batch sizes do not fit `dp` data-parallel ranks, or None if they do."""
    try:
        check_batches(config.train, dp)
    except ConfigError as error:
        return str(error)
    return None


def _sort_key(row: Row, limit: float | None) -> tuple[Any, ...]:
    """Return the sort key: layouts that fit come first, and among them those with less communication and recompute.

    In order: room to spare, a smaller product of the degrees that split the model, less recompute, a lower ZeRO stage,
    less memory. Layouts that do not fit are sorted by memory alone. `LAYOUTS` of config/usage.py explains it to users.
    """
    if not row.fits(limit):
        return (1, row.memory.total)
    c = row.candidate
    recompute = ("none", "selective", "full").index(c.recompute)
    return (0, row.is_full(limit), c.tp * c.pp * c.cp, recompute, c.zero, row.memory.total)


# ---------------------------------------------------------------------------------------------------- printing


def header_lines(
    config: LayoutsConfig, job: TrainConfig, world_size: int, notes: list[str], rows: list[Row]
) -> Iterator[str]:
    """Yield the lines above the table."""
    loop, limit = job.train, usable_bytes(config)
    precision = job.precision.name + ("" if job.precision.name == "fp32" else " on fp32 masters")
    yield f"{job.model.name}: {num_parameters(job.model):,} parameters, {precision}, {_ranks(world_size)}"
    yield (
        f"{loop.global_batch_size * loop.seq_len:,} tokens a step: {loop.global_batch_size:,} sequences of "
        f"{loop.seq_len:,}, {loop.micro_batch_size} a micro-batch"
    )
    if notes:
        yield f"assumed, because not given: {'; '.join(notes)}"
    fitting = sum(row.fits(limit) for row in rows)
    if limit is None:
        yield f"{len(rows):,} legal layouts"
    else:
        yield (
            f"{len(rows):,} legal layouts, {fitting:,} of them within {limit / GIB:g} GiB "
            f"(layouts.memory_gib={config.layouts.memory_gib:g}, less layouts.margin={config.layouts.margin:g})"
        )
    best = (
        "best guess first: the smallest tp x pp x cp, then the least recompute, the lowest ZeRO stage, the least memory"
    )
    others = "; nearly full ones after those" if any(row.is_full(limit) for row in rows) else ""
    others += "" if fitting == len(rows) else "; those that do not fit last, by memory"
    yield (best + others if fitting else "none fits, so the least memory comes first") + " (why: --help)"
    yield "GiB of the fullest rank:"


HEADINGS = ("engine", "dp", "tp", "pp", "cp", "zero", "pipeline", "recompute", *KINDS, "total", "fits")


def table_cells(row: Row, limit: float | None) -> list[str]:
    """Return the cells of one line of the table."""
    c, layout = row.candidate, row.layout
    pipeline = "" if c.pp == 1 else c.schedule + (f" x {c.virtual_stages}" if c.virtual_stages > 1 else "")
    groups = f"{c.zero} in {c.dp_replicate}" if c.dp_replicate > 1 else str(c.zero)
    context = f"{c.cp} {c.cp_kind}" if c.cp > 1 else "1"
    sizes = [getattr(row.memory, kind) for kind in KINDS] + [row.memory.total]
    fits = "" if limit is None else "nearly full" if row.is_full(limit) else "yes" if row.fits(limit) else "no"
    return [
        c.engine, str(layout.dp), str(c.tp), str(c.pp), context, groups, pipeline, c.recompute,
        *(f"{size / GIB:.2f}" for size in sizes), fits,
    ]  # fmt: skip


def print_table(rows: list[Row], limit: float | None) -> None:
    """Print the rows in aligned columns; on a terminal with bold headings, and without columns that do not fit."""
    lines = [table_cells(row, limit) for row in rows]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for index, text in enumerate(table_lines(lines, width)):
        print(f"\033[1m{text}\033[0m" if index == 0 and width is not None else text)


def table_lines(lines: list[list[str]], width: int | None) -> list[str]:
    """Return the headings and the rows in aligned columns.

    In fewer columns than they need, those that have one value in all rows are left out first, then the parts of the
    memory, and a last line says so.
    """
    columns = dict(zip(HEADINGS, zip(HEADINGS, *lines, strict=True), strict=True))
    same = {
        name: cells[1] for name, cells in columns.items() if name not in ("engine", "total") and len({*cells[1:]}) == 1
    }
    left_out: list[str] = []
    for names in ([*same], [name for name in KINDS if name not in same]):
        if width is None or sum(max(map(len, columns[name])) + 2 for name in columns) - 2 <= width:
            break
        left_out += [f"{name} ({same[name]} in all)" if same.get(name) else name for name in names]
        columns = {name: cells for name, cells in columns.items() if name not in names}
    left = ("engine", "cp", "pipeline", "recompute", "fits")
    padded = []
    for name, cells in columns.items():
        size = max(map(len, cells))
        padded.append([cell.ljust(size) if name in left else cell.rjust(size) for cell in cells])
    found = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    if left_out:
        found += ["", f"left out, to fit the window: {', '.join(left_out)}; a wider one, or `| less -S`, shows them"]
    return found


def row_record(row: Row, job: TrainConfig, limit: float | None) -> dict[str, Any]:
    """Return a row for programs: the keys for `megatrain train`, and sizes in bytes. `fits` is null without a limit."""
    bytes_ = {f"{kind}_bytes": getattr(row.memory, kind) for kind in (*KINDS, "total")}
    return {**row.overrides(job), "dp": row.layout.dp, **bytes_, "fits": None if limit is None else row.fits(limit)}


def explain_no_layout(config: LayoutsConfig, job: TrainConfig, world_size: int, refused: Counter[str]) -> str:
    """Return the message for no legal layout: the most frequent reasons, and which given keys to leave open."""
    axes, lines = open_axes(config), [f"no layout of {_ranks(world_size)} is legal with these keys"]
    examples: dict[str, str] = {}
    for _, refusal, view in judge(job, world_size, axes):
        if refusal is not None and refusal.name not in examples:
            examples[refusal.name] = _message(refusal, view, world_size)
    for name, count in refused.most_common(3):
        lines.append(f"  {count:,} of {sum(refused.values()):,}: {examples.get(name, name)}")
    for key in _given_keys(config):
        opened = deepcopy(config)
        group, _, name = key.partition(".")
        setattr(getattr(opened, group), name, None)
        opened_job, _ = fill_open_sizes(opened, world_size)
        rows, _ = find_legal(opened_job, world_size, open_axes(opened))
        if rows:
            nearest = min(rows, key=lambda row: _distance(row, config))
            lines.append(
                f"  without {key}={_value(config, key)}, {len(rows):,} are legal, for example "
                f"{nearest.layout.describe()}"
            )
    return "\n".join(lines)


def _given_keys(config: LayoutsConfig) -> list[str]:
    """Return the keys of the search that are not null."""
    keys = [*AXIS_KEYS.values(), "parallel.schedule", "parallel.virtual_stages"]
    return [key for key in [*keys, "train.global_batch_size", "train.seq_len"] if _value(config, key) is not None]


def _message(refusal: Refusal, config: TrainConfig, world_size: int) -> str:
    """Return the refusal's message for this config, or else its summary."""
    return explain(refusal, config, world_size) or refusal.summary


def _distance(row: Row, config: LayoutsConfig) -> tuple[int, ...]:
    """Return how far a row's degrees are from the given ones."""
    c, parallel = row.candidate, config.parallel
    wanted = (parallel.tp, parallel.pp, parallel.cp)
    distance = sum(abs(have - want) for have, want in zip((c.tp, c.pp, c.cp), wanted, strict=True) if want is not None)
    return distance, c.tp * c.pp * c.cp, row.memory.total
