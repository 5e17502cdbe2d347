"""`--multirun` of train and tune: start the points of a sweep, one after another or as Slurm jobs. Imports no torch.

Each point is started by the command that a person would type, so it is owned, restarted, requeued and resumed like any
run. `sweep_points.py` works out the points.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from megatrain.checkpoint.resume import changed_keys, may_change
from megatrain.config.suggest import next_step
from megatrain.distributed.python_process import python_command
from megatrain.distributed.rank_environment import is_launched
from megatrain.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_SAVED_AFTER_SIGNAL, ConfigError, DataError
from megatrain.launch import slurm
from megatrain.launch.agent import FORWARDED_SIGNALS
from megatrain.launch.rank_process import LINUX
from megatrain.resilience.signals import set_parent_death_signal
from megatrain.resilience.terminal import keep_log
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import iter_metrics
from megatrain.tracking.mlflow_scores import send_sweep_scores
from megatrain.verbs import folds
from megatrain.verbs.folds import asks_for_folds, number_of_folds
from megatrain.verbs.sweep_points import (
    FOLD,
    Point,
    check_points,
    compose_points,
    errors_name_point,
    sweep_folder,
    write_record,
)
from megatrain.verbs.train import prepare_missing

POLL_S = 0.05
"""Seconds between checks for a signal to forward to the running point."""


def multirun(overrides: Sequence[str], flags: set[str], verb: str = "train") -> int:
    """Run or submit a sweep of `train` or `tune`, or only show it (`--cfg`, `--dry-run`).

    `tune` with `data.folds` has a point for each fold.

    Returns 0 if every point is done or submitted, 75 (or 130) if a signal ended the sweep, else the exit code of the
    first point that failed. Raises ConfigError and the other errors of a plain start before any point is started.
    """
    if is_launched() or slurm.Step.from_environ() is not None:
        raise ConfigError("--multirun starts jobs and cannot be part of one; run it from a shell outside the job")
    if verb == "tune" and asks_for_folds(overrides):
        overrides = [*overrides, f"{FOLD}=range(1,{number_of_folds(overrides) + 1})"]
    points = compose_points(overrides, verb, make=not flags & {"--cfg", "--dry-run"})
    if "--cfg" in flags:
        for point in points:
            print(f"---\n# {point.recorded.label}\n{yaml.safe_dump(asdict(point.config), sort_keys=False)}", end="")
        return EXIT_OK
    if "--dry-run" not in flags:
        for point in points:
            prepare_missing(point.config)
    check_points(points)
    start_all = submit_all if points[0].config.launch.name == "slurm" else run_all
    return start_all(points, sorted(flags - {"--dry-run"}), "--dry-run" in flags)


def is_done(point: Point) -> bool:
    """Return whether a point's run has finished with the config that is now requested.

    A run whose config differs in a key that may not change counts as not done; starting it then fails with the reason.
    """
    try:
        ends = [
            event
            for event in read_events(point.folder / "events.jsonl")
            if event["kind"] in ("start", "resume", "stop")
        ]
        saved = yaml.safe_load((point.folder / "config.yaml").read_text(encoding="utf-8"))
        wanted = asdict(point.config)
        if wanted["model"]["vocab_size"] is None:
            wanted["model"]["vocab_size"] = saved["model"]["vocab_size"]  # the tokenizer's
        changed = changed_keys(saved, wanted)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
        return False  # not started, or damaged
    unfinished = [
        key for key in changed if not may_change(key) or key == "train.steps" or key.startswith("train.early_stop")
    ]
    return bool(ends) and ends[-1].get("status") == "done" and not unfinished


# ---------------------------------------------------------------------------------------------------- on Slurm


def submit_all(points: Sequence[Point], flags: Sequence[str], dry_run: bool) -> int:
    """Submit the points, except those done or already queued, and print each one's job and run."""
    if not dry_run:
        write_record(points)
    jobs = slurm.jobs_here()
    to_show: list[tuple[str, slurm.Submission]] = []
    for number, point in enumerate(points, start=1):
        name = str(point.config.run.name)
        with errors_name_point(number, len(points), point.values):
            if is_done(point):
                print(f"{'# ' * dry_run}done  {name}")
            elif name in jobs:
                print(f"{'# ' * dry_run}{jobs[name]}  {name} (in the queue already)")
            else:
                submission = slurm.Submission.of(
                    point.config.launch,
                    name,
                    [*flags, *point.overrides],
                    options={"nodes": point.config.launch.num_nodes or 1},
                )
                if dry_run:
                    to_show.append((name, submission))
                else:
                    print(f"{submission.submit()}  {name}", flush=True)
    if not dry_run:
        show_folds(points)
    if to_show:
        slurm.show_dry_run(to_show[0][1].script, [f"job {name}" for name, _ in to_show])
        print("\n".join(str(submission) for _, submission in to_show))
    return EXIT_OK


# ---------------------------------------------------------------------------------------------------- on this machine


def run_all(points: Sequence[Point], flags: Sequence[str], dry_run: bool) -> int:
    """Run the points one after another, print a table at the end, and return the exit code.

    A failed point does not stop the others. A signal is forwarded to the running point, and no further point starts.
    """
    command = python_command("megatrain", "train", *flags)
    if dry_run:
        for point in points:
            print(f"megatrain train {shlex.join([*flags, *point.overrides])}")
        return EXIT_OK
    write_record(points)
    keep_log(sweep_folder(points) / "logs" / "multirun.log")
    codes: list[int | None] = []
    with _RunningPoint() as current:
        for number, point in enumerate(points, start=1):
            if current.signal_number:
                codes.append(None)
                continue
            print(f"== point {number} of {len(points)}: {point.config.run.name}", flush=True)
            if is_done(point):
                print("done already", flush=True)
                codes.append(EXIT_OK)
            else:
                codes.append(current.run([*command, *point.overrides]))
    print(table(points, codes), flush=True)
    show_folds(points)
    print("\n" + what_next(points), flush=True)
    failed = [code for code in codes if code != EXIT_OK]
    if not failed:
        return EXIT_OK
    if current.signal_number:
        return EXIT_INTERRUPTED if EXIT_INTERRUPTED in codes else EXIT_SAVED_AFTER_SIGNAL
    return failed[0] or EXIT_OK


def show_folds(points: Sequence[Point]) -> None:
    """Print what the folds of a cross-validation say, if any is done, and keep it in the sweep's folder and MLflow."""
    if points[0].config.data.fold is None or not any(done := [is_done(point) for point in points]):
        return
    settings = folds.summarise(points, done)
    folder = sweep_folder(points)
    folds.save(folder, settings)
    print(f"{folds.table(settings)}\n\n(in {folder / folds.FILE})", flush=True)
    if scores := folds.scores(settings):
        send_sweep_scores(points[0].folder, scores)


class _RunningPoint:
    """The process of the running point, and the signals to forward to it.

    It has its own session, so that a Ctrl-C reaches it only once, from here. On Linux it dies with this process.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._to_forward: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _RunningPoint:
        for number in FORWARDED_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # stay ignored under nohup
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """Start a point, wait for it and return its exit code: 128 + the signal if a signal killed it."""
        own = os.getpid()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=(lambda: set_parent_death_signal(own)) if LINUX else None,
        )
        while True:
            while self._to_forward:
                process.send_signal(self._to_forward.pop(0))
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(POLL_S)
                return code if code >= 0 else 128 - code

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number
        self._to_forward.append(number)


def table(points: Sequence[Point], codes: Sequence[int | None]) -> str:
    """Return a table of the points' exit codes and last losses."""
    rows: list[tuple[str, ...]] = [("point", "exit code", "loss", "held-out loss")]
    for point, code in zip(points, codes, strict=True):
        losses = (f"{value:.4f}" if value is not None else "-" for value in last_losses(point.folder))
        rows.append((str(point.config.run.name), "not run" if code is None else str(code), *losses))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{row[0]:{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in (1, 2, 3)) for row in rows]
    return "\n".join(["", *lines])


def what_next(points: Sequence[Point]) -> str:
    """Return the line that says which command shows the points side by side."""
    return next_step(f"megatrain report {shlex.quote(str(sweep_folder(points)))}")


def last_losses(run_dir: Path) -> tuple[float | None, float | None]:
    """Return a run's last loss and held-out loss, as far as its metrics can be read."""
    loss = heldout = None
    try:
        for record in iter_metrics(run_dir / "metrics.jsonl"):
            loss = record.get("loss", loss)
            heldout = record.get("heldout_loss", heldout)
    except (OSError, DataError):
        pass
    return loss, heldout
