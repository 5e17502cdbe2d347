"""`profile=true`: profile a few steps, as a Chrome trace of every rank and a table of the main rank.

The profiler listens to the phases that the trainer and the engines report to the heartbeat, so the training loop knows
nothing of it. The window is fixed: each start skips three steps (compilation, caches), warms the profiler up for two
and traces three.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from megatrain.distributed.world import World
from megatrain.errors import EnvironmentFault

WAIT, WARM_UP, ACTIVE = 3, 2, 3
"""Numbers of steps of a start: to skip, to warm up the profiler, and to trace."""

FIRST_TRACED = WAIT + WARM_UP + 1
"""The first traced step, counted from the start."""

PHASES = ("data", "exchange", "forward", "backward", "update")
"""The phases of a step in order. Each lasts until the next is reported."""

NAME = "megatrain::"
"""The prefix of our ranges in a trace."""

NUM_OPERATIONS = 20
"""Number of operations in the table."""

_LOG = logging.getLogger("megatrain")


@contextmanager
def profiled_steps(folder: Path, world: World, show: Callable[[str], None]) -> Iterator[None]:
    """Trace the steps in the window into `<folder>/trace_rank_00000.json.gz`, one file per rank.

    The main rank writes its table to `<folder>/table.txt` and passes it to `show` at the end.

    Raises:
        EnvironmentFault: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"profile=true cannot write to {folder}: {error.strerror}; remove that file or choose another run.name"
        ) from error
    listener = StepProfile(folder, world)
    world.heartbeat.listener = listener
    try:
        yield
    finally:
        world.heartbeat.listener = None
        table = listener.close()
        with suppress(OSError):  # a folder with traces is not empty and stays
            folder.rmdir()
        if world.is_main:
            show(table)


class StepProfile:
    """A heartbeat listener that traces the window and sums up the time of each phase."""

    def __init__(self, folder: Path, world: World) -> None:
        self.world = world
        self.folder = folder
        self.trace = folder / f"trace_rank_{world.rank:05d}.json.gz"
        self.begun = 0  # steps since the start
        self.steps: list[int] = []  # the traced ones
        self.seconds: dict[str, float] = defaultdict(float)
        self.waits: dict[str, float] = defaultdict(float)
        self.table = ""
        self._profiler: profile | None = None
        self._ranges: list[record_function] = []  # the open ones: the step's, and within it the phase's
        self._phase = ""
        self._since = 0

    # ------------------------------------------------------------------------------------------- listening

    def enter(self, phase: str, step: int) -> None:
        """End the current phase and begin the next; `data` begins a step."""
        if self.table:
            return
        self._leave()
        if phase == "data":
            self._leave_step()
            self.begun += 1
            self._advance()
            if self._is_tracing:
                self.steps.append(step)
                self._open(f"step {step}")
        if self._is_tracing and self.steps:
            self._open(phase)
            self._phase, self._since = phase, time.perf_counter_ns()

    def waited(self, nanoseconds: int) -> None:
        """Add time that the current phase spent waiting for other ranks."""
        if self._phase:
            self.waits[self._phase] += nanoseconds / 1e9

    @property
    def _is_tracing(self) -> bool:
        return self._profiler is not None and self.begun >= FIRST_TRACED

    def _open(self, name: str) -> None:
        opened = record_function(NAME + name)
        opened.__enter__()
        self._ranges.append(opened)

    def _leave(self) -> None:
        """Close the phase's range and add its time."""
        if self._phase:
            self.seconds[self._phase] += (time.perf_counter_ns() - self._since) / 1e9
            self._phase = ""
            self._ranges.pop().__exit__(None, None, None)

    def _leave_step(self) -> None:
        """Close the step's range."""
        while self._ranges:
            self._ranges.pop().__exit__(None, None, None)

    def _advance(self) -> None:
        """Start, advance or stop the profiler, depending on the number of the step that begins."""
        if self.begun == WAIT + 1:
            on_gpu = self.world.device.type == "cuda"
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
                schedule=schedule(wait=0, warmup=WARM_UP, active=ACTIVE, repeat=1),
                on_trace_ready=self._write,
                profile_memory=True,
            )
            self._profiler.start()
        elif self._profiler is not None:
            self._profiler.step()  # after the last traced step this writes
        if self.begun > WAIT + WARM_UP + ACTIVE:
            self._stop()

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def close(self) -> str:
        """Stop profiling and return the table, or the reason why there is none."""
        self._leave()
        self._leave_step()
        self._stop()  # writes traced steps that are not written yet
        return self.table or f"profile=true traced nothing: it begins with the {FIRST_TRACED}th step of a start"

    # ------------------------------------------------------------------------------------------- writing

    def _write(self, profiler: profile) -> None:
        if not self.steps or self.table:
            return
        self.world.heartbeat.beat()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.trace))
            self.table = self._make_table(profiler)
            if self.world.is_main:
                (self.folder / "table.txt").write_text(self.table + "\n", encoding="utf-8")
        except OSError as error:  # a failed trace must not stop the run
            self.table = f"profile=true could not write {self.folder}: {error}"
            _LOG.warning(self.table)
        self.world.heartbeat.beat()

    def _make_table(self, profiler: profile) -> str:
        """Return the table: the phases of a step, then the operations with the most self time."""
        on_gpu = self.world.device.type == "cuda"
        kernels, communication = device_times(profiler.events() or []) if on_gpu else ({}, {})
        first, last = self.steps[0], self.steps[-1]
        shown_steps = f"step {first}" if first == last else f"steps {first} to {last}"
        rows = phase_rows(self.seconds, self.waits, kernels, communication, len(self.steps), on_gpu)
        return "\n".join(
            [
                f"Where a step goes: mean of {shown_steps}, "
                f"rank {self.world.rank} of {self.world.size} ({self.world.device.type})",
                "",
                *rows,
                "",
                "Operations by their own time per step (evaluating and saving between the traced steps counts); "
                f"the trace: {self.trace}",
                "",
                *operation_rows(profiler.key_averages(), len(self.steps), on_gpu),
            ]
        )


def device_times(events: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of all GPU kernels and of NCCL's alone, by the phase in which any thread launched them."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = sorted(
        (event.time_range.start, event.time_range.end, event.name.removeprefix(NAME))
        for event in on_host
        if event.name.startswith(NAME) and not event.name.startswith(f"{NAME}step ")
    )
    starts = [start for start, _, _ in ranges]
    total: dict[str, float] = defaultdict(float)
    communication: dict[str, float] = defaultdict(float)
    for event in on_host:
        if event.name.startswith(NAME):  # a range may own its phase's kernels, which would count twice
            continue
        place = bisect.bisect_right(starts, event.time_range.start) - 1
        if place < 0 or event.time_range.start > ranges[place][1]:
            continue
        for kernel in event.kernels:
            total[ranges[place][2]] += kernel.duration / 1e6
            if "nccl" in kernel.name.lower():
                communication[ranges[place][2]] += kernel.duration / 1e6
    return total, communication


def phase_rows(
    seconds: dict[str, float],
    waits: dict[str, float],
    kernels: dict[str, float],
    communication: dict[str, float],
    num_steps: int,
    on_gpu: bool,
) -> list[str]:
    """Return a line per phase in milliseconds per step, their sum, and the phases between steps (`evaluate`, `save`).

    Communication is part of the phases. On a CPU it is the time the rank waited for others, on a GPU the time of NCCL's
    kernels, which may overlap with other kernels.
    """
    last = ["GPU kernels, ms", "of those communication, ms"] if on_gpu else ["of that communication, ms"]
    lines = [f"{'phase':<12}{'ms a step':>12}{'share':>9}" + "".join(f"{name:>28}" for name in last)]
    inside = [phase for phase in PHASES if phase in seconds]
    whole = sum(seconds[phase] for phase in inside)

    def line(name: str, members: list[str]) -> str:
        columns = [kernels, communication] if on_gpu else [waits]
        spent, *rest = (sum(column.get(m, 0.0) for m in members) / num_steps * 1e3 for column in [seconds, *columns])
        share = f"{spent * num_steps / 1e3 / whole:.1%}" if whole and set(members) <= set(PHASES) else ""
        return f"{name:<12}{spent:>12.3f}{share:>9}" + "".join(f"{value:>28.3f}" for value in rest)

    lines += [line(phase, [phase]) for phase in inside]
    lines.append(line("step", inside))
    lines += [line(phase, [phase]) for phase in seconds if phase not in PHASES]
    if "forward" in inside and "backward" not in inside:
        lines.append("(a pipeline's schedule mixes forward and backward: both are in forward)")
    return lines


def operation_rows(averages: Any, num_steps: int, on_gpu: bool) -> list[str]:
    """Return the table's rows of the operations with the most self time: device time on a GPU, else CPU time.

    Memory is what an operation itself allocated minus what it freed, per step.
    """

    def own_time(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    operations = [event for event in averages if not event.key.startswith((NAME, "ProfilerStep"))]
    lines = [f"{'operation':<44}{'calls':>9}{'CPU, ms':>11}" + f"{'GPU, ms':>11}" * on_gpu + f"{'memory, MiB':>14}"]
    for event in sorted(operations, key=own_time, reverse=True)[:NUM_OPERATIONS]:
        name = event.key if len(event.key) < 44 else event.key[:40] + "..."
        memory = event.self_device_memory_usage if on_gpu else event.self_cpu_memory_usage
        device = f"{event.self_device_time_total / 1e3 / num_steps:>11.3f}" if on_gpu else ""
        lines.append(
            f"{name:<44}{event.count / num_steps:>9.1f}{event.self_cpu_time_total / 1e3 / num_steps:>11.3f}{device}"
            f"{memory / 2**20 / num_steps:>14.2f}"
        )
    return lines
