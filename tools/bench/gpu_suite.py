"""Measure all goals that need one GPU, in under ten minutes, and print a table of results (see gpu_suite.sh).

Each row is measured independently. One that fails, does not fit, is not built yet or has no time left becomes a line
"not measured: why". `rows` lists them. `--small` runs them at toy sizes on the CPU, where the GPU's goals do not
apply.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from turns import (
    HERE,
    ROOT,
    Turn,
    TurnFailed,
    commit,
    last_line,
    machine,
    prepare,
    probe,
    take_turn,
    usable_cores,
)

PEAK = 989e12
"""FLOP/s to which the MFU goals refer: dense bf16 on an H100 SXM."""


PROTECTIONS = (
    "checkpoint.memory_every=0",
    "resilience.spike_zscore=0 resilience.slow_rank_ratio=0",
    "checkpoint.memory_every=0 resilience.spike_zscore=0 resilience.slow_rank_ratio=0 launch.preflight=false",
)
"""Overrides that turn off the copies in memory; the loss guard and the comparison of ranks; all of them."""


@dataclass
class Line:
    """A line of the table. If nothing was measured, `value` is None and `note` says why."""

    what: str
    value: float | None
    shown: str
    goal: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Return whether the goal is reached; empty if there is no goal or no measurement."""
        if self.value is None or self.goal is None:
            return ""
        return "reached" if self.value >= self.goal else "missed"


class Suite:
    """Runs the rows one after another within a time budget."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.small, self.folder, self.rounds = arguments.small, folder, arguments.rounds
        self.deadline = time.monotonic() + arguments.minutes * 60
        self.own = probe("megatrain")
        self.device = "cuda" if self.own["gpu"] and not arguments.small else "cpu"
        self.turns: list[Turn] = []

    def run(self, name: str, measure: Callable[[], list[Line]]) -> list[Line]:
        """Return a row's lines, or one line that says why there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            return [Line(name, None, "", note="the time was up")]
        print(f"== {name} ({left:.0f} s left)", flush=True)
        try:
            return measure()
        except TurnFailed as error:
            return [Line(name, None, "", note=str(error))]

    def job(self, name: str, words: list[str], chain: bool = False, document: int | None = None) -> dict[str, Any]:
        """Prepare a job in its own folder."""
        place = Path(tempfile.mkdtemp(prefix=name, dir=self.folder))
        defaults = ["engine=native", f"launch.device={self.device}", "optim.schedule=constant", "checkpoint.every=0"]
        if find_spec("mlflow") is None:  # its absence would be waited for
            defaults.append("tracking.name=none")
        return prepare(place, [*defaults, *words], self.device, chain, document)

    def turn(self, contender: str, job: dict[str, Any], warmup: int) -> Turn:
        """Take one turn, print it and keep it."""
        turn = take_turn(contender, 1 + len(self.turns), job, self.folder, usable_cores(), warmup)
        self.turns.append(turn)
        print(
            f"   {contender}: {turn.step_s * 1e3:,.1f} ms a step, {turn.tokens_per_s:,.0f} tokens/s, "
            f"{turn.first_step_s:.0f} s to the first step",
            flush=True,
        )
        return turn

    def need_gpu(self) -> None:
        """Raise `TurnFailed` on a CPU, unless toy sizes were requested."""
        if self.device == "cpu" and not self.small:
            raise TurnFailed("torch finds no GPU here")

    # ------------------------------------------------------------------------------------------- rows

    def against_bare(self) -> list[Line]:
        """Measure gpt2_124m: tokens/s, and megatrain against a bare loop with the whole model compiled."""
        self.need_gpu()
        sizes = ["model=gpt2_124m", "precision=bf16", "compile=true", *loop(30, 64, 32, 1024)]
        if self.small:
            sizes = ["model=tiny", *loop(8, 2, 2, 32)]
        job = self.job("gpt2_124m", sizes)
        bare = "bare-eager" if self.small else "bare-compiled"
        where = f"{job['model']['name']}, T={job['seq_len']}, {job['precision']}"
        goals = (None, None) if self.small else (470_000.0, 1.05)
        ours, ratios, reason = [], [], ""
        for _ in range(1 if self.small else self.rounds):
            ours.append(self.turn("megatrain", job, 5).tokens_per_s)
            try:
                ratios.append(ours[-1] / self.turn(bare, job, 5).tokens_per_s)
            except TurnFailed as error:
                reason = str(error)
        rate = statistics.median(ours)
        ratio = statistics.median(ratios) if ratios else None
        shown = f"{ratio:.3f}, median of {len(ratios)}" if ratios else ""
        return [
            Line(f"{where}: tokens/s", rate, f"{rate:,.0f}", goals[0]),
            Line(f"{where}: times {bare}", ratio, shown, goals[1], reason),
        ]

    def utilisation(
        self, name: str, words: list[str], goal: float | None, rate_goal: float | None = None
    ) -> list[Line]:
        """Measure the MFU (relative to PEAK) or the tokens/s of one model. `name` says which words are no defaults."""
        self.need_gpu()
        if self.small:
            raise TurnFailed("only on a GPU")
        # it is ended before its last save, which would take longer than its steps
        job = {**self.job(name.split(",")[0], words), "cut": True}
        turn = self.turn("megatrain", job, job["steps"] // 3)
        if rate_goal is not None:
            return [Line(f"{name}: tokens/s", turn.tokens_per_s, f"{turn.tokens_per_s:,.0f}", rate_goal)]
        mfu = turn.tokens_per_s * job["flops_per_token"] / PEAK
        memory = f", {turn.peak_device_bytes / 2**30:.0f} GiB" if turn.peak_device_bytes else ""
        return [Line(f"{name}: MFU", mfu, f"{mfu:.1%} ({turn.tokens_per_s:,.0f} tokens/s{memory})", goal)]

    def eight_billion(self, fp8: bool) -> list[Line]:
        """Measure llama_8b with bf16 moments, and in fp8."""
        # a copy in memory and its staging take three times the 64 GB of the state, and the preflight asks for as much
        # of the disk: more than the machine of one GPU has
        off = ["checkpoint.memory_every=0", "launch.preflight=false"]
        name = f"llama_8b{' in fp8' if fp8 else ''}, T=2048, bf16 moments, {' '.join(off)}"
        words = ["model=llama_8b", f"precision={'fp8' if fp8 else 'bf16'}", "compile=true", "optim.moments=bf16"]
        return self.utilisation(name, [*words, *off, *loop(12, 16, 2, 2048)], 0.46, 10_900.0 if fp8 else None)

    def protections(self) -> list[Line]:
        """Measure what the copies in memory and the guards cost a step, each against its absence."""
        self.need_gpu()
        sizes = ["model=gpt2_124m", "precision=bf16", "compile=true", *loop(40, 64, 32, 1024)]
        if self.small:
            sizes = ["model=tiny", *loop(12, 2, 2, 32)]
        whole: dict[str, list[float]] = {words: [] for words in ("", *PROTECTIONS)}
        for _ in range(1 if self.small else self.rounds):
            for words, seconds in whole.items():
                job = self.job("protections", [*sizes, *words.split()])
                seconds.append(self.turn("megatrain", {**job, "cut": True}, 5).whole_step_s)
        lines = []
        for words in PROTECTIONS:
            ratios = [on / off for on, off in zip(whole[""], whole[words], strict=True)]
            ratio = statistics.median(ratios)
            lines.append(Line(f"time of a step at the defaults, against {words}", ratio, f"{ratio:.3f}"))
        return lines

    def kernels(self) -> list[Line]:
        """Run the kernels' benchmark, if it exists; its output is printed above the table."""
        script = HERE / "kernels.py"
        if not script.exists():
            raise TurnFailed("tools/bench/kernels.py does not exist yet")
        self.need_gpu()
        if self.small:
            raise TurnFailed("only on a GPU")
        done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=False)
        print(done.stdout, flush=True)
        if done.returncode:
            raise TurnFailed(f"tools/bench/kernels.py ended with {done.returncode}: {last_line(done.stderr)}")
        return [Line("kernels: see above", 1.0, last_line(done.stdout)[:60])]

    def losses(self) -> list[Line]:
        """Compare a small Llama's losses in bf16, with every fast option on, with fp32 and the reference operations."""
        self.need_gpu()
        steps = 12 if self.small else 200
        sizes = [
            "model=tiny" if self.small else "model=small",
            *loop(steps, *((2, 2, 32) if self.small else (16, 16, 256))),
        ]
        fast = ["precision=bf16", f"compile={str(not self.small).lower()}"]
        found = []
        for name, words in (("reference", ["precision=fp32", "kernels=reference"]), ("bf16", fast)):
            found.append(
                self.turn("megatrain", self.job(f"losses-{name}", [*sizes, *words, "optim.lr=1e-3"], True), 5).losses
            )
        apart = [abs(low / high - 1) for high, low in zip(*found, strict=True)]
        losses = f"loss {found[0][0]:.2f} to {found[0][-1]:.2f}"
        shown = f"mean {statistics.mean(apart):.2e}, largest {max(apart):.2e} ({losses})"
        return [Line(f"bf16 losses off the fp32 reference's, {steps} steps, relative", max(apart), shown)]

    def documents(self) -> list[Line]:
        """Measure gpt2_124m with train.mask_documents=true against false, where documents are long and short."""
        self.need_gpu()
        words = ["model=gpt2_124m", "precision=bf16", "compile=true", *loop(20, 64, 32, 1024)]
        if self.small:
            words = ["model=tiny", *loop(8, 2, 2, 64)]
        lines = []
        for document, goal in ((4096, 0.97), (64, 1.0)):
            job = self.job(f"documents-{document}", words, document=document)
            masked = {**job, "words": [*job["words"], "train.mask_documents=true"]}
            ratios = [
                self.turn("megatrain", masked, 5).tokens_per_s / self.turn("megatrain", job, 5).tokens_per_s
                for _ in range(1 if self.small else self.rounds)
            ]
            ratio = statistics.median(ratios)
            what = f"documents of {document} tokens on average: masked times unmasked"
            lines.append(Line(what, ratio, f"{ratio:.3f}, median of {len(ratios)}", None if self.small else goal))
        return lines

    def rows(self) -> list[tuple[str, Callable[[], list[Line]]]]:
        """Return each row's name and measurement, the most important first."""
        large = [
            "model=gpt2_1558m",
            "precision=bf16",
            "compile=true",
            *loop(12, 64, 16, 1024),
        ]
        return [
            ("gpt2_124m, T=1024, bf16", self.against_bare),
            ("gpt2_1558m, T=1024, bf16", lambda: self.utilisation("gpt2_1558m, T=1024, bf16", large, 0.52)),
            ("llama_8b, T=2048, bf16 moments", lambda: self.eight_billion(fp8=False)),
            ("llama_8b in fp8, T=2048, bf16 moments", lambda: self.eight_billion(fp8=True)),
            ("kernels", self.kernels),
            ("bf16 losses against the fp32 reference", self.losses),
            ("protections", self.protections),
            ("documents masked", self.documents),
        ]


def loop(steps: int, batch: int, micro_batch: int, seq_len: int) -> list[str]:
    """Return the loop's sizes as overrides."""
    return [
        f"train.steps={steps}", f"train.global_batch_size={batch}", f"train.micro_batch_size={micro_batch}",
        f"train.seq_len={seq_len}",
    ]  # fmt: skip


def table(lines: list[Line]) -> str:
    """Format the table."""
    rows = ["| what | measured | goal | |", "| --- | ---: | ---: | --- |"]
    for line in lines:
        goal = "" if line.goal is None else f"{line.goal:,.0f}" if line.goal > 100 else f"{line.goal:g}"
        shown = line.shown if line.value is not None else f"not measured: {line.note}"
        rows.append(f"| {line.what} | {shown} | {goal} | {line.verdict} |")
    return "\n".join(rows)


def main() -> int:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy sizes on the CPU, to see that it works")
    parser.add_argument("--minutes", type=float, default=9.5, help="no row begins after so many minutes (default 9.5)")
    parser.add_argument("--rounds", type=int, default=2, help="pairs of the comparison with the bare loop (default 2)")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        suite = Suite(arguments, folder)
        if not any(arguments.only in name for name, _ in suite.rows()):
            raise TurnFailed(
                f"--only {arguments.only}: no row's name holds that; {'; '.join(n for n, _ in suite.rows())}"
            )
        lines = [line for name, measure in suite.rows() if arguments.only in name for line in suite.run(name, measure)]
    except TurnFailed as error:
        print(f"gpu_suite: error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    where = machine(suite.own)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if arguments.json:
        result = {"date": date, "commit": commit(), "machine": where, "versions": suite.own["versions"]}
        result |= {"lines": [asdict(line) for line in lines], "turns": [asdict(turn) for turn in suite.turns]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{where['gpu'] or where['cpu']}, torch {suite.own['versions']['torch']}, commit {commit()}, {date}\n")
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
