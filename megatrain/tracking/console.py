"""The progress that rank 0 shows: a progress bar on a terminal, plain lines elsewhere. Imports no torch.

Nothing here is stored; metrics.jsonl holds the numbers.
"""

from __future__ import annotations

import math
import shlex
import time
from collections import deque
from typing import Any

from megatrain.config.suggest import next_step
from megatrain.resilience.terminal import Terminal, show
from megatrain.tracking.event_words import describe
from megatrain.tracking.tracker import RunInfo

RECENT_STEPS = 50
"""Number of recent steps whose wall time, including evaluations and saves, predicts the time left."""

KEPT_LINES = 10
"""Lines of steps that a run leaves above the bar, evaluations apart."""

MIN_BAR = 10
"""Width of the narrowest bar; where less is left, there is none."""


class Console:
    """The progress of a run on standard error.

    A terminal gets a bar, and above it notes and a line at every tenth of the run and at each evaluation.
    Any other stream gets a line every `every_steps` steps or `every_s` seconds, whichever comes first, and at the first
    step, the last step and each evaluation. While an evaluation or a save holds up the steps, the bar shows how far it
    is; any other stream gets a line every `every_s` seconds.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        terminal: Terminal | None = None,
        every_steps: int = 100,
        every_s: float = 10.0,
    ) -> None:
        """`terminal` is the process's own by default."""
        self._total = total_steps
        self._every_steps, self._every_s = every_steps, every_s
        self._terminal = terminal or Terminal.current()
        self._has_bar = False
        self._step, self._status = 0, ""
        self._next = ""
        self._moments: deque[float] = deque(maxlen=RECENT_STEPS + 1)
        self._doing = ""
        self._told: float | None = None
        self._last_line: tuple[int, float] | None = None
        self._began: float | None = None
        self._reward: float | None = None  # of the last replies; several steps may learn from them

    def start(self, info: RunInfo) -> None:
        """Print what runs and where, and start the bar on a terminal."""
        self._began = time.monotonic()
        if info.config.get("run", {}).get("sweep") is None:  # a sweep says once what comes next
            folder = shlex.quote(str(info.run_dir))
            self._next = next_step(f"megatrain report {folder}", try_out(folder, info))
        chosen = info.config.get("launch", {}).get("device") == "auto" and info.device == "cpu"
        device = f"{info.world_size} x {info.device}" + (" (no GPU found)" if chosen else "")
        parts = [f"{short(info.num_parameters)} parameters", device, info.layout]
        self.note(f"run {info.run_name}: " + ", ".join(part for part in [*parts, length(info)] if part))
        if info.resumed_from_step is not None:
            self.note(f"resuming from step {info.resumed_from_step}")
        if self._terminal is not None and self._terminal.has_status_line:
            self._has_bar = True
            self._step = info.resumed_from_step or 0
            self._terminal.start_status(self.bar)

    def step(self, record: dict[str, Any]) -> None:
        """Update the bar, or print a line if one is due."""
        self._end_progress()
        moment = time.monotonic()
        if not self._moments:
            self._moments.append(moment - (record.get("step_time_s") or 0.0))
        self._moments.append(moment)
        if self._has_bar:
            self._step, self._status = record["step"], self.status(record)
            if self._is_kept(record):
                self.note(f"{self._place(record['step'])}  {self._status}")
        elif record.get("heldout_loss") is not None or self._is_line_due(record["step"], moment):
            self._last_line = (record["step"], moment)
            self.note(f"{self._place(record['step'])}  {self.status(record)}")

    def event(self, event: dict[str, Any]) -> None:
        """Show an event as a note, except those that `start()` and `finish()` show."""
        self._end_progress()
        if event["kind"] not in ("start", "resume", "stop"):
            self.note(describe(event))

    def progress(self, step: int, text: str) -> None:
        """Show on the bar what holds up the steps, or print a line if the last one is `every_s` seconds old."""
        moment = time.monotonic()
        if self._has_bar:
            self._doing = text
        elif self._told is None:
            self._told = moment
        elif moment - self._told >= self._every_s:
            self._told = moment
            self.note(f"step {step}: {text}")

    def _end_progress(self) -> None:
        self._doing, self._told = "", None

    def finish(self, status: str) -> None:
        """Stop the bar and print how the run ended."""
        self.abandon()
        lasted = f" in {clock(time.monotonic() - self._began)}" if self._began is not None else ""
        self.note(f"run {status}{lasted}" + ("; the same command continues it" if status == "stopped" else ""))
        if self._next and status == "done":
            for line in self._next.splitlines():
                self.note(line)

    def abandon(self) -> None:
        """Stop the bar."""
        self._end_progress()
        if self._has_bar and self._terminal is not None:
            self._terminal.end_status()
            self._has_bar = False

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        show(text, self._terminal.stderr if self._terminal is not None else None)

    def bar(self, width: int) -> str:
        """Return the bar in `width` columns: `step 120/1000 ━━━━──────── loss 3.2145  12.3k tok/s  eta 0:04:03`."""
        step, status = self._step, self._doing or self._status
        before = f"{self._place(step)} "
        room = width - len(before) - len(status) - 1
        if room < MIN_BAR:
            return before + status
        done = round(room * step / self._total) if self._total else room
        return f"{before}{'━' * done}{'─' * (room - done)} {status}"

    def status(self, record: dict[str, Any]) -> str:
        """Return a step's numbers on one line: `loss 3.2145  12.3k tok/s  mfu 31.2%  eta 0:04:03`."""
        loss, mfu = record.get("loss"), record.get("mfu")
        skipped = record.get("updated") is False
        without = "loss not finite" if skipped else "no loss, as no token counts"
        parts = [f"loss {loss:.4f}" if loss is not None and math.isfinite(loss) else without]
        if skipped:
            parts.append("skipped")
        self._reward = record.get("reward", self._reward)
        if self._reward is not None:
            parts.append(f"reward {self._reward:.3f}")
        if record.get("tokens_per_s") is not None:
            parts.append(f"{short(record['tokens_per_s']):>5} tok/s")
        if mfu is not None:
            parts.append(f"mfu {mfu:.1%}")
        if record["step"] < self._total:
            parts.append(f"eta {clock(self.seconds_left(record['step']))}")
        return "  ".join(parts)

    def _place(self, step: int) -> str:
        """Return `step  20/1000`, as wide at the first step as at the last."""
        return f"step {step:>{len(str(self._total))}}/{self._total}"

    def seconds_left(self, step: int) -> float:
        """Return the number of steps left times the mean wall time of recent ones; 0.0 before the first."""
        if len(self._moments) < 2:
            return 0.0
        per_step = (self._moments[-1] - self._moments[0]) / (len(self._moments) - 1)
        return max(0, self._total - step) * per_step

    def _is_kept(self, record: dict[str, Any]) -> bool:
        """Return whether a step's line stays above the bar. The bar itself shows the last step."""
        step: int = record["step"]
        every = max(1, self._total // KEPT_LINES)
        return step < self._total and (step % every == 0 or record.get("heldout_loss") is not None)

    def _is_line_due(self, step: int, moment: float) -> bool:
        if self._last_line is None or step >= self._total:
            return True
        last_step, last_moment = self._last_line
        return step - last_step >= self._every_steps or moment - last_moment >= self._every_s


def try_out(folder: str, info: RunInfo) -> str:
    """Return the command that shows what a run in `folder`, quoted for the shell, has learnt."""
    card = info.dataset
    if info.config.get("model", {}).get("output") == "score":
        return f"megatrain evaluate {folder}"  # a reward model writes nothing
    splits = card.get("splits", {}).values()
    if any(part.get("loss_hashes") for split in splits for part in [split, *split.get("parts", ())]):
        return f"megatrain chat {folder}"  # conversations
    kind = card.get("config", {}).get("data", {}).get("kind")
    prompt = "def main(" if kind in ("python_stdlib", "code") else "Once upon a time"
    return f'megatrain generate {folder} prompt="{prompt}"'


def short(number: float) -> str:
    """Format a count in at most five characters: 999, 1.23k, 45.6M, 1.75B, 1.01T."""
    for unit in ("", "k", "M", "B"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def clock(seconds: float) -> str:
    """Format a duration as h:mm:ss, preceded by days if there are any."""
    days, rest = divmod(round(seconds), 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {text}" if days else text


def length(info: RunInfo) -> str:
    """Return how long a run is: `1,000 steps, 2.05M tokens (0.43 epochs)`; without tokens if batches grow."""
    loop = info.config.get("train", {})
    steps, ramp = loop.get("steps"), loop.get("batch_ramp_start")
    if steps is None or ramp:
        return f"{steps:,} steps" if steps else ""
    tokens = steps * loop["global_batch_size"] * loop["seq_len"]
    mixed = info.config.get("data", {}).get("mixture")  # then each source has epochs of its own
    data = None if mixed else info.dataset.get("splits", {}).get("train", {}).get("tokens")
    return f"{steps:,} steps, {short(tokens)} tokens" + (f" ({tokens / data:.3g} epochs)" if data else "")
