"""`megatrain layouts`: the legal layouts of a training job as a table, with what each rank holds. Imports no torch.

What is legal is parallel/layout.py's, what there is to try parallel/candidates.py's, the memory parallel/memory.py's; here
stand the job that open keys make, the order of the rows, and how they are printed.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from megatrain.config import LayoutsConfig, TrainConfig
from megatrain.errors import ConfigError
from megatrain.model.count import num_parameters
from megatrain.parallel.layout import Layout
from megatrain.parallel.rules import Refusal
from megatrain.planner.candidates import SCHEDULES, Axes, Candidate, judge
from megatrain.planner.memory import KINDS, Memory, MemoryModel
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
"""The axes that one key alone fixes; `parallel.schedule` and `parallel.virtual_stages` fix one together."""


@dataclass(frozen=True)
class Row:
    """One legal layout and what its fullest rank holds."""

    candidate: Candidate
    layout: Layout
    memory: Memory

    def fits(self, limit_gib: float | None) -> bool:
        """Whether a device of that size holds it."""
        return limit_gib is None or self.memory.total <= limit_gib * GIB


def layouts(config: LayoutsConfig) -> None:
    """Print every legal layout. Raises ConfigError, with what stands in the way, where there is none."""
    world_size = config.launch.world_size or config.launch.nproc_per_node * (config.launch.num_nodes or 1)
    job, notes = job_of(config, world_size)
    rows, refused = find(job, world_size, axes_of(config))
    if not rows:
        raise ConfigError(nothing_legal(config, job, world_size, refused))
    limit = config.layouts.memory_gib
    rows.sort(key=lambda row: _order(row, limit))
    shown = shortened(rows, config.layouts.limit)
    if config.layouts.format == "json":
        print(json.dumps([record(row, job, limit) for row in shown], indent=1))
    elif config.layouts.format == "csv":
        records = [record(row, job, limit) for row in shown]
        writer = csv.DictWriter(sys.stdout, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    else:
        print("\n".join(header(job, world_size, notes, rows, limit)), end="\n\n")
        print_table(shown, limit)
        if len(shown) < len(rows):
            print(
                f"\n{len(rows) - len(shown):,} more, layouts.limit=0 shows them; here each engine and degrees stand once, as far as the limit goes; "
                f"any key that is given narrows the list"
            )


def shortened(rows: list[Row], limit: int) -> list[Row]:
    """So many of the rows, in their order: the first of each engine and degrees, and what comes next where there is room."""
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


def job_of(config: LayoutsConfig, world_size: int) -> tuple[TrainConfig, list[str]]:
    """The training job, open sizes filled in, and which they were. Raises ConfigError where its keys do not go together."""
    job, notes = TrainConfig(), []
    _copy_given(config, job)
    loop = job.train
    if config.model.vocab_size is None:
        job.model.vocab_size = config.tokenizer.vocab_size
        notes.append(
            f"a vocabulary of {config.tokenizer.vocab_size:,} (tokenizer.vocab_size; a trained one may differ)"
        )
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


def _copy_given(source: Any, target: Any) -> None:
    """Copy every key that `target` has too and that is not null, group by group."""
    for f in fields(target):
        value = getattr(source, f.name)
        if is_dataclass(value):
            _copy_given(value, getattr(target, f.name))
        elif value is not None:
            setattr(target, f.name, value)


def axes_of(config: LayoutsConfig) -> Axes:
    """What varies: an axis whose key is given has that value alone."""
    given = {axis: value for axis, key in AXIS_KEYS.items() if (value := _value(config, key)) is not None}
    schedule, virtual = config.parallel.schedule, config.parallel.virtual_stages
    pairs = [(name, virtual or usual) for name, usual in SCHEDULES if schedule in (None, name)]
    return Axes(
        schedules=tuple(pairs),
        without_pipeline=((schedule or "1f1b", virtual or 1),),
        **{axis: (value,) for axis, value in given.items()},
    )


def _value(config: Any, key: str) -> Any:
    group, _, name = key.partition(".")
    return getattr(getattr(config, group), name)


# ---------------------------------------------------------------------------------------------------- search


def find(job: TrainConfig, world_size: int, axes: Axes) -> tuple[list[Row], Counter[str]]:
    """The legal rows, and how often each message refused the others."""
    model, rows, refused = MemoryModel(job.model), [], Counter[str]()
    batches: dict[int, str | None] = {}
    for candidate, refusal, config in judge(job, world_size, axes):
        if refusal is not None:
            refused[refusal.name] += 1
            continue
        layout = Layout.of(config, world_size)
        if layout.dp not in batches:
            batches[layout.dp] = _batch_fault(config, layout.dp)
        if (fault := batches[layout.dp]) is not None:
            refused[fault] += 1
        elif not _is_repeated(candidate, layout, axes):
            rows.append(Row(candidate, layout, model.largest(config, layout)))
    return rows, refused


def _is_repeated(candidate: Candidate, layout: Layout, axes: Axes) -> bool:
    """Whether it is another name of a layout that was listed: natively, ZeRO stages of a rank that shares with nobody."""
    return candidate.engine == "native" and layout.dp * layout.cp == 1 and candidate.zero != axes.zeros[0]


def _batch_fault(config: TrainConfig, dp: int) -> str | None:
    try:
        check_batches(config.train, dp)
    except ConfigError as error:
        return str(error)
    return None


def _order(row: Row, limit_gib: float | None) -> tuple[Any, ...]:
    """What fits first, then what talks and repeats least: a smaller product of the degrees that cut a model, less recompute,
    a lower ZeRO stage; then fewer bytes. What does not fit stands by its bytes alone."""
    if not row.fits(limit_gib):
        return (1, row.memory.total)
    c = row.candidate
    recompute = ("none", "selective", "full").index(c.recompute)
    return (0, c.tp * c.pp * c.cp, recompute, c.zero, row.memory.total)


# ---------------------------------------------------------------------------------------------------- printing


def header(job: TrainConfig, world_size: int, notes: list[str], rows: list[Row], limit: float | None) -> Iterator[str]:
    """What the table is about."""
    loop = job.train
    masters = "" if job.precision.name == "fp32" else " on fp32 masters"
    yield f"{job.model.name}: {num_parameters(job.model):,} parameters, {job.precision.name}{masters}, {world_size:,} ranks"
    yield (
        f"{loop.global_batch_size * loop.seq_len:,} tokens a step: {loop.global_batch_size:,} sequences of "
        f"{loop.seq_len:,}, {loop.micro_batch_size} a micro-batch"
    )
    if notes:
        yield f"not given, so taken: {'; '.join(notes)}"
    fitting = (
        ""
        if limit is None
        else f", {sum(row.fits(limit) for row in rows):,} of them within layouts.memory_gib={limit:g}"
    )
    yield f"{len(rows):,} legal layouts{fitting}; GiB of the fullest rank:"


HEADINGS = ("engine", "dp", "tp", "pp", "cp", "zero", "pipeline", "recompute", *KINDS, "total", "fits")


def cells(row: Row, limit: float | None) -> list[str]:
    """One line of the table."""
    c, layout = row.candidate, row.layout
    pipeline = "" if c.pp == 1 else c.schedule + (f" x {c.virtual_stages}" if c.virtual_stages > 1 else "")
    groups = f"{c.zero} in {c.dp_replicate}" if c.dp_replicate > 1 else str(c.zero)
    context = f"{c.cp} {c.cp_kind}" if c.cp > 1 else "1"
    sizes = [getattr(row.memory, kind) for kind in KINDS] + [row.memory.total]
    fits = "" if limit is None else "yes" if row.fits(limit) else "no"
    return [
        c.engine, str(layout.dp), str(c.tp), str(c.pp), context, groups, pipeline, c.recompute,
        *(f"{size / GIB:.2f}" for size in sizes), fits,
    ]  # fmt: skip


def print_table(rows: list[Row], limit: float | None) -> None:
    """The rows in columns; bold headings on a terminal."""
    lines = [cells(row, limit) for row in rows]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *lines, strict=True)]
    left = ("engine", "cp", "pipeline", "recompute", "fits")
    for index, line in enumerate([list(HEADINGS), *lines]):
        text = "  ".join(
            cell.ljust(width) if heading in left else cell.rjust(width)
            for heading, cell, width in zip(HEADINGS, line, widths, strict=True)
        ).rstrip()
        print(f"\033[1m{text}\033[0m" if index == 0 and sys.stdout.isatty() else text)


def record(row: Row, job: TrainConfig, limit: float | None) -> dict[str, Any]:
    """A row for programs: the keys to give `megatrain train`, and bytes; `fits` is null without a limit."""
    c = row.candidate
    keys = {
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
    bytes_ = {f"{kind}_bytes": getattr(row.memory, kind) for kind in (*KINDS, "total")}
    return {**keys, "dp": row.layout.dp, **bytes_, "fits": None if limit is None else row.fits(limit)}


def nothing_legal(config: LayoutsConfig, job: TrainConfig, world_size: int, refused: Counter[str]) -> str:
    """Why no layout is legal, most frequent reason first, and which of the given keys to leave open."""
    axes, lines = axes_of(config), [f"no layout of {world_size} ranks is legal with these keys"]
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
        other, _ = job_of(opened, world_size)
        rows, _ = find(other, world_size, axes_of(opened))
        if rows:
            nearest = min(rows, key=lambda row: _distance(row, config))
            lines.append(
                f"  without {key}={_value(config, key)} {len(rows):,} are legal, for example {nearest.layout.describe()}"
            )
    return "\n".join(lines)


def _given_keys(config: LayoutsConfig) -> list[str]:
    keys = [*AXIS_KEYS.values(), "parallel.schedule", "parallel.virtual_stages"]
    return [key for key in [*keys, "train.global_batch_size", "train.seq_len"] if _value(config, key) is not None]


def _message(refusal: Refusal, config: TrainConfig, world_size: int) -> str:
    return refusal.check(config, world_size) or refusal.summary


def _distance(row: Row, config: LayoutsConfig) -> tuple[int, ...]:
    """How far a row's degrees are from those given."""
    c, parallel = row.candidate, config.parallel
    wanted = (parallel.tp, parallel.pp, parallel.cp)
    far = sum(abs(have - want) for have, want in zip((c.tp, c.pp, c.cp), wanted, strict=True) if want is not None)
    return far, c.tp * c.pp * c.cp, row.memory.total
