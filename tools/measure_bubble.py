"""Measures how long the ranks of a pipeline wait: idle over ideal time of each schedule, against the theory.

    python tools/measure_bubble.py [--pp 2 4] [--micro-batches 8] [--forward-ms 20] [--backward-ms 40] [--svg FILE]

Real ranks run megatrain's pipeline over gloo; only what a stage computes is replaced by sleeping, half of the backward
time for the inputs' part and half for the weights'. Ranks that compute on shared cores would wait for each other's
cores. With several stages a rank, each sleeps its share, so that a rank's ideal time is the same for all schedules.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.data.batch import MicroBatch
from megatrain.parallel.layout import Layout
from megatrain.parallel.schedules import Pipeline
from megatrain.parallel.stages import LOOPED, V_SHAPED, ZERO_BUBBLE
from megatrain.planner.timeline import Action, Span, Timeline, orders, simulate, theoretical_bubble
from megatrain.report.timeline_drawing import draw

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")
ROWS, LENGTH, WIDTH = 1, 4, 8


class SleepInBackward(torch.autograd.Function):
    """Identity that sleeps in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, action: Action, spans: list[Span]) -> Tensor:
        ctx.seconds, ctx.action, ctx.spans = seconds, action, spans
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        sleep(ctx.seconds, ctx.action, ctx.spans)
        return gradient, None, None, None


def sleep(seconds: float, action: Action, spans: list[Span]) -> None:
    """Sleep and record the span (CLOCK_MONOTONIC, one clock for all processes)."""
    start = time.monotonic()
    time.sleep(seconds)
    spans.append(Span(action, start, time.monotonic()))


class SleepingStage(nn.Module):
    """A pipeline stage whose forward pass, inputs' gradient and weights' gradient each take a fixed time."""

    def __init__(self, number: int, num_stages: int, forward_s: float, backward_s: float, spans: list[Span]) -> None:
        super().__init__()
        self.number, self.num_stages, self.spans = number, num_stages, spans
        self.forward_s, self.half_s = forward_s, backward_s / 2
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.entry = nn.Parameter(torch.ones(WIDTH)) if number == 0 else None

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        m = int(index)
        sleep(self.forward_s, Action(self.number, "F", m), self.spans)
        if self.entry is not None:
            x = x[..., None] * self.entry
        through = SleepInBackward.apply(x, self.half_s, Action(self.number, "I", m), self.spans)
        beside = SleepInBackward.apply(self.weight, self.half_s, Action(self.number, "W", m), self.spans)
        output: Tensor = through + beside
        return output.sum() if self.number + 1 == self.num_stages else output


def make_layout(schedule: str, pp: int, virtual_stages: int) -> Layout:
    return Layout(
        world_size=pp,
        dp=1,
        cp=1,
        tp=1,
        pp=pp,
        zero=0,
        dp_replicate=1,
        schedule=schedule,
        virtual_stages=virtual_stages,
        cp_kind="ulysses",
        engine="native",
        precision="fp32",
    )


def stages_a_rank(schedule: str) -> int:
    return 2 if schedule in LOOPED + V_SHAPED else 1


def run_rank(rank: int, folder: str, schedule: str, options: argparse.Namespace, pp: int) -> None:
    """One rank: a step to warm up, then the measured ones; writes its spans to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", pp), rank=rank, world_size=pp)
    group = dist.group.WORLD
    assert group is not None
    v = stages_a_rank(schedule)
    layout = make_layout(schedule, pp, v)
    spans: list[Span] = []
    seconds = (options.forward_ms / 1000 / v, options.backward_ms / 1000 / v)
    stages = {number: SleepingStage(number, layout.num_stages, *seconds, spans) for number in layout.stages_of(rank)}
    examples = torch.empty(ROWS, LENGTH, dtype=torch.int64), torch.empty(ROWS, LENGTH, WIDTH)
    pipeline = Pipeline(layout, stages, group, examples)
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    steps = []
    for _ in range(options.steps + 1):
        spans.clear()
        dist.barrier()
        pipeline.train([MicroBatch(tokens, tokens)] * options.micro_batches, lambda loss: loss)
        steps.append(list(spans) if schedule in ZERO_BUBBLE else whole_backwards(spans))
    Path(folder, f"rank{rank}").write_bytes(pickle.dumps(steps[1:]))
    dist.barrier()
    dist.destroy_process_group()


def whole_backwards(spans: list[Span]) -> list[Span]:
    """Merge both parts of each backward pass into one action."""
    whole: list[Span] = []
    for action, start, end in spans:
        last = whole[-1].action if whole else None
        if action.kind == "F":
            whole.append(Span(action, start, end))
        elif last == (both := Action(action.stage, "B", action.micro_batch)):
            whole[-1] = Span(both, whole[-1].start, end)
        else:
            whole.append(Span(both, start, end))
    return whole


def measure(schedule: str, pp: int, options: argparse.Namespace) -> list[Timeline]:
    """Return the measured steps of a schedule, with times from each step's first action."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(run_rank, (folder, schedule, options, pp), nprocs=pp, start_method="fork")
        ranks = [pickle.loads(Path(folder, f"rank{rank}").read_bytes()) for rank in range(pp)]
    timelines = []
    for step in zip(*ranks, strict=True):
        first = min(spans[0].start for spans in step)
        timelines.append(Timeline([[Span(a, s - first, e - first) for a, s, e in spans] for spans in step]))
    return timelines


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Idle over ideal time of each pipeline schedule, measured on real ranks whose stages sleep.",
        epilog="The figures and the picture in docs/measurements/pipeline_schedules.md come from here.",
    )
    parser.add_argument("--pp", type=int, nargs="+", default=[2, 4], help="pipeline ranks (default: 2 4)")
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=SCHEDULES, help="default: all")
    parser.add_argument("--micro-batches", type=int, default=8, help="a step; a multiple of each --pp (default: 8)")
    parser.add_argument("--forward-ms", type=float, default=20.0, help="a rank's forward, all its stages (default: 20)")
    parser.add_argument("--backward-ms", type=float, default=40.0, help="a rank's whole backward (default: 40)")
    parser.add_argument(
        "--steps", type=int, default=5, help="measured steps, of which the median is reported (default: 5)"
    )
    parser.add_argument("--svg", type=Path, help="draw a measured step of each schedule with the last --pp")
    options = parser.parse_args()
    if any(options.micro_batches % pp or options.micro_batches < pp for pp in options.pp):
        parser.error(f"--micro-batches {options.micro_batches} is not a multiple of each --pp {options.pp}")
    durations = {"F": options.forward_ms, "B": options.backward_ms, "I": options.backward_ms / 2}
    durations["W"] = durations["I"]
    rows, pictures = [], []
    for pp in options.pp:
        for schedule in options.schedule:
            print(f"pp={pp} {schedule} ...", end="\r", file=sys.stderr, flush=True)
            v = stages_a_rank(schedule)
            timelines = measure(schedule, pp, options)
            measured = statistics.median(timeline.bubble for timeline in timelines)
            simulated = simulate(orders(schedule, pp, v, options.micro_batches), durations).bubble
            theory = theoretical_bubble(pp, v, options.micro_batches)
            rows.append(f"| {pp} | {schedule} | {v} | {theory:.3f} | {simulated:.3f} | {measured:.3f} |")
            if pp == options.pp[-1]:
                typical = min(timelines, key=lambda timeline: abs(timeline.bubble - measured))
                pictures.append((f"{schedule}: {measured:.1%} idle over ideal time", typical))
    print(" " * 60, end="\r", file=sys.stderr)
    print("| p | schedule | v | (p-1)/(v m) | simulated | measured |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    if options.svg:
        options.svg.write_text(draw(pictures) + "\n", encoding="utf-8")
        print(f"{options.svg}: a measured step of each schedule, pp={options.pp[-1]}", file=sys.stderr)


if __name__ == "__main__":
    main()
