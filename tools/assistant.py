"""Make an assistant at toy size: text, tokenizer, base model, conversations, and what comes after them.

Started by tools/assistant.sh. Each stage is a `megatrain` command that is printed first. What is finished is kept, so
the same command goes on where it was; a stage's figures are in `runs/assistant.json`. docs/guide/assistant.md explains
the stages.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from assistant_scores import read_lines, score_replies

DATA = Path("data/toy")
RECORDS = DATA / "records"
FIGURES = Path("runs/assistant.json")

Figures = dict[str, str]


class StageError(Exception):
    """A command that failed, with its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Stage:
    """A step of the story: its name, what it does, its commands, and what it has reached (names to figures).

    `commands` end at once if they were done before. `measure` is given the heldout prompts' number.
    """

    name: str
    title: str
    commands: Sequence[Sequence[str]]
    measure: Callable[[int], Figures]


def greedy(run: str, count: int) -> Figures:
    """Return what a model's greedy and sampled replies to held-out questions are worth."""
    prompts = read_lines(RECORDS / "prompts_heldout.jsonl")[:count]
    found = score_replies(run, prompts)
    sampled = score_replies(run, prompts, temperature=1.0)
    return {
        "exact": str(found["exact"]),
        "right": str(found["right"]),
        "full sentences": str(found["style"]),
        "sampled exact": str(sampled["exact"]),
    }


def base_loss(run: str) -> str:
    """Return a model's held-out loss on the base text, in nats: what it has not forgotten."""
    done = subprocess.run(
        command("evaluate", run, f"data={DATA}", "max_batches=16"), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise StageError(done.returncode)
    return f"{json.loads(done.stdout.strip().splitlines()[-1])['loss']:.3f}"


def of_run(run: str) -> Callable[[int], Figures]:
    """Return how a run is measured: its replies, and its loss on the base text."""
    return lambda count: {**greedy(run, count), "loss on base text": base_loss(run)}


def of_data(count: int) -> Figures:
    """Return how large the prepared text is."""
    del count
    splits = json.loads((DATA / "card.json").read_text(encoding="utf-8"))["splits"]
    return {name: f"{split['tokens']:,} tokens" for name, split in splits.items()}


def stages(overrides: Mapping[str, Sequence[str]]) -> list[Stage]:
    """Return all stages in order; `overrides` are further words for the commands of a stage."""

    def words(name: str, *command: str) -> list[str]:
        return [*command, *overrides.get(name, ()), *overrides.get("all", ())]

    return [
        Stage("data", "text, conversations, pairs and prompts", [["prepare", "data=toy"]], of_data),
        Stage(
            "base",
            "a base model that knows five skills",
            [words("base", "train", "experiment=assistant_toy")],
            of_run("runs/toy-base"),
        ),
        Stage(
            "sft",
            "it answers questions",
            [words("sft", "tune", "runs/toy-base", "experiment=assistant_toy_sft")],
            of_run("runs/toy-sft"),
        ),
    ]


def main() -> int:
    """Run all stages; return the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="held-out questions to ask (default: 400)")
    parser.add_argument("--until", help="last stage to run, by name")
    parser.add_argument(
        "overrides", nargs="*", help="further words for a stage's command, such as base:train.steps=50 or all:seed=1"
    )
    arguments = parser.parse_args()
    try:
        run_all(arguments.overrides, arguments.count, arguments.until)
    except StageError as error:
        return error.code
    return 0


def run_all(overrides: Sequence[str], count: int, until: str | None) -> None:
    """Run the stages up to `until`, and print a line of what each has reached."""
    chosen: dict[str, list[str]] = {}
    for word in overrides:
        name, _, override = word.partition(":")
        chosen.setdefault(name, []).append(override)
    listed, started = stages(chosen), time.monotonic()
    figures: dict[str, Figures] = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    for number, stage in enumerate(listed, start=1):
        begun = time.monotonic()
        print(f"\n== {number}/{len(listed)} {stage.name}: {stage.title}", flush=True)
        for one in stage.commands:
            megatrain(*one)
        if stage.name not in figures:
            figures[stage.name] = stage.measure(count)
            FIGURES.parent.mkdir(parents=True, exist_ok=True)
            FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        reached = ", ".join(f"{name} {value}" for name, value in figures[stage.name].items())
        print(f"   {stage.name}: {reached} ({time.monotonic() - begun:.0f} s)", flush=True)
        if stage.name == until:
            break
    print(f"\n   {time.monotonic() - started:.0f} s in all; the figures are in {FIGURES}", flush=True)


def command(*words: str) -> list[str]:
    """Return a megatrain command for this interpreter, and print it as a user would type it."""
    print("$ megatrain " + shlex.join(words), flush=True)
    return [sys.executable, "-m", "megatrain", *words]


def megatrain(*words: str) -> None:
    """Run a megatrain command to its end. Raises StageError if it fails."""
    code = subprocess.run(command(*words), check=False).returncode
    if code:
        raise StageError(code)


if __name__ == "__main__":
    sys.exit(main())
