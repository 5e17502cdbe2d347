"""Make an assistant at toy size: text, tokenizer, base model, conversations, preferences, rewards, a chat page.

Started by tools/assistant.sh. Each stage is a few `megatrain` commands that are printed first. What is finished is
kept, so the same command goes on where it was; the figures of all stages are in `runs/assistant.json`. At the end a
server answers on a chat page, until Ctrl-C where the output is a terminal. docs/guide/assistant.md explains the stages.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from assistant_scores import read_lines
from assistant_stages import COMPRESSED, RECORDS, Figures, Stage, fingerprint, stages

from megatrain.verbs.printer import Printer

FIGURES = Path("runs/assistant.json")


class StageError(Exception):
    """A stage that cannot be made, with the exit code; what is wrong has been printed."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def main() -> int:
    """Run all stages; return the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="held-out questions to ask (default: 400)")
    parser.add_argument("--until", help="last stage to run, by name")
    parser.add_argument("--stop", action="store_true", help="end the server after its first answer")
    parser.add_argument(
        "overrides", nargs="*", help="further words for a stage's command, such as base:train.steps=50 or all:seed=1"
    )
    arguments = parser.parse_args()
    listed = stages(words := words_of(arguments.overrides))
    names = [stage.name for stage in listed]
    for name in [*words, *([arguments.until] if arguments.until else [])]:
        if name not in (*names, "all"):
            parser.error(f"{name}: no such stage; there are {', '.join(names)}")
    started = time.monotonic()
    try:
        for number, stage in enumerate(listed, start=1):
            print(f"\n== {number}/{len(listed) + 1} {stage.name}: {stage.title}", flush=True)
            run_stage(stage, listed, arguments.count)
            if stage.name == arguments.until:
                return 0
        print(f"\n== {len(listed) + 1}/{len(listed) + 1} serve: a page to chat", flush=True)
        megatrain("report", COMPRESSED)
        show_figures(listed)
        with server(COMPRESSED) as address:
            ask(address)
            print(f"   all stages took {time.monotonic() - started:.0f} s", flush=True)
            say_what_next(address, stays := sys.stdout.isatty() and not arguments.stop)
            if stays:
                signal.sigwait([signal.SIGINT, signal.SIGTERM])
    except StageError as error:
        if error.code in (75, 130):
            print("   stopped; the same command goes on from here", flush=True)
        return error.code
    except KeyboardInterrupt:
        print("   stopped; the same command goes on from here", flush=True)
        return 130
    return 0


# ---------------------------------------------------------------------------------------------------------- the stages


def run_stage(stage: Stage, listed: Sequence[Stage], count: int) -> None:
    """Run a stage's commands, measure what it made unless that was done, and print a line of what it has reached.

    Raises StageError if a command fails, or the stage was made from a model that has changed since.
    """
    begun = time.monotonic()
    refuse_outdated(stage, listed)
    if not stage.is_made():
        for one in stage.commands:
            megatrain(*one)
    figures = kept_figures(stage, count)
    if figures is None:
        figures = stage.measure(count)
        keep_figures(stage, count, figures)
    reached = ", ".join(f"{name} {value}" for name, value in figures.items())
    print(f"   {stage.name}: {reached} ({time.monotonic() - begun:.0f} s)", flush=True)


def refuse_outdated(stage: Stage, listed: Sequence[Stage]) -> None:
    """Raise StageError if what the stage made came from a model that has changed since; say what to remove."""
    changed = stage.outdated()
    if changed is None:
        return
    gone = [stage.makes]
    for later in listed:
        if set(gone) & set(later.made_from) and Path(later.makes).exists():
            gone.append(later.makes)
    print(
        f"   {stage.makes} was made from {changed}, which has changed since. To make it again, first remove it and "
        f"what came of it: rm -r {shlex.join(gone)}",
        flush=True,
    )
    raise StageError(2)


def kept_figures(stage: Stage, count: int) -> Figures | None:
    """Return the stage's figures if they are of what it has made now, and of as many questions."""
    kept = all_figures().get(stage.name, {})
    same = (kept.get("fingerprint"), kept.get("questions")) == (fingerprint(stage.makes), count)
    found: Figures | None = kept["figures"] if same else None
    return found


def keep_figures(stage: Stage, count: int, figures: Figures) -> None:
    """Write a stage's figures beside those of the others."""
    kept = all_figures()
    kept[stage.name] = {"fingerprint": fingerprint(stage.makes), "questions": count, "figures": figures}
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    FIGURES.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def all_figures() -> dict[str, Any]:
    """Return what is kept of all stages: fingerprint, number of questions, and figures."""
    kept: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    return kept


# ------------------------------------------------------------------------------------------------------------- the end


def show_figures(listed: Sequence[Stage]) -> None:
    """Print the figures of all models as a table, and the reward model's below it."""
    kept = all_figures()
    figures = {stage.name: kept[stage.name]["figures"] for stage in listed}
    columns = list(dict.fromkeys(name for one in figures.values() if "exact" in one for name in one))
    rows = [[name, *(one.get(column, "") for column in columns)] for name, one in figures.items() if "exact" in one]
    Printer().table(f"what each model reached, also in {FIGURES}", ["stage", *columns], rows)


def ask(address: str) -> None:
    """Ask the server a held-out question, and print its answer."""
    asked = read_lines(RECORDS / "prompts_heldout.jsonl")[0]
    body = {
        "messages": [{"role": "user", "content": asked["prompt"]}],
        "temperature": 0,
        "model": Path(COMPRESSED).name,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        reply = json.load(answer)["choices"][0]["message"]["content"]
    print(f"   asked {asked['prompt']!r}, it answers {reply!r} (right: {asked['label']!r})", flush=True)


def say_what_next(address: str, stays: bool) -> None:
    """Print where to go on."""
    serve = f"open {address}/ (Ctrl-C ends the server)" if stays else f"megatrain serve {COMPRESSED}"
    offered = {
        "chat on a page": serve,
        "chat here": f"megatrain chat {COMPRESSED}",
        "see where the model came from": f"megatrain inspect {COMPRESSED}, or open {COMPRESSED}/report.html",
        "use your own data": "docs/guide/assistant.md",
    }
    print("\nnext:", flush=True)
    for what, how in offered.items():
        print(f"   {what:30} {how}", flush=True)


@contextmanager
def server(path: str) -> Iterator[str]:
    """Start a server, and give its address once it is up. Raises StageError if it ends before."""
    process = subprocess.Popen(command("serve", path, "serve.port=0"), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "http://" in line), "")
        found = re.search(r"http://[^\s/]+", line)
        if found is None:
            raise StageError(process.wait() or 1)
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def command(*words: str) -> list[str]:
    """Return a megatrain command for this interpreter, and print it as a user would type it."""
    print("$ megatrain " + shlex.join(words), flush=True)
    return [sys.executable, "-m", "megatrain", *words]


def megatrain(*words: str) -> None:
    """Run a megatrain command to its end. Raises StageError if it fails.

    Ctrl-C reaches the command too, which then saves: it gets the time for that.
    """
    with subprocess.Popen(command(*words)) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            code = process.wait()
    if code:
        raise StageError(code)


def words_of(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the further words of each stage."""
    chosen: dict[str, list[str]] = {}
    for word in overrides:
        name, _, override = word.partition(":")
        chosen.setdefault(name, []).append(override)
    return chosen


if __name__ == "__main__":
    sys.exit(main())
