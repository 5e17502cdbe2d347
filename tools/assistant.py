"""Make an assistant at toy size: text, tokenizer, base model, conversations, preferences, rewards, a chat page.

Started by tools/assistant.sh. Each stage is a `megatrain` command that is printed first. What is finished is kept, so
the same command goes on where it was; the figures of all stages are in `runs/assistant.json`. At the end a server
answers on a chat page, until Ctrl-C where the output is a terminal. docs/guide/assistant.md explains the stages.
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

from assistant_scores import read_lines
from assistant_stages import COMPRESSED, RECORDS, Figures, Stage, stages

FIGURES = Path("runs/assistant.json")


class StageError(Exception):
    """A command that failed, with its exit code."""

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
    started = time.monotonic()
    try:
        for number, stage in enumerate(listed := stages(words_of(arguments.overrides)), start=1):
            print(f"\n== {number}/{len(listed) + 1} {stage.name}: {stage.title}", flush=True)
            run_stage(stage, arguments.count)
            if stage.name == arguments.until:
                return 0
        print(f"\n== {len(listed) + 1}/{len(listed) + 1} a page that shows it all, and a page to chat", flush=True)
        megatrain("report", "runs/toy-grpo")
        print(f"   {time.monotonic() - started:.0f} s in all; the figures are in {FIGURES}", flush=True)
        serve(COMPRESSED, stays=sys.stdout.isatty() and not arguments.stop)
    except StageError as error:
        return error.code
    return 0


def run_stage(stage: Stage, count: int) -> None:
    """Run a stage's commands, measure it unless that is done, and print a line of what it has reached."""
    begun = time.monotonic()
    for one in stage.commands:
        if not (stage.makes and Path(stage.makes).exists()):
            megatrain(*one)
    figures: dict[str, Figures] = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    if stage.name not in figures:
        figures[stage.name] = stage.measure(count)
        FIGURES.parent.mkdir(parents=True, exist_ok=True)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    reached = ", ".join(f"{name} {value}" for name, value in figures[stage.name].items())
    print(f"   {stage.name}: {reached} ({time.monotonic() - begun:.0f} s)", flush=True)


def serve(path: str, stays: bool) -> None:
    """Serve a model on a free port, ask it a held-out question over HTTP, and print address and answer."""
    with server(path) as address:
        asked = read_lines(RECORDS / "prompts_heldout.jsonl")[0]
        body = {"messages": [{"role": "user", "content": asked["prompt"]}], "temperature": 0, "model": Path(path).name}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            reply = json.load(answer)["choices"][0]["message"]["content"]
        print(f"   asked {asked['prompt']!r}, it answers {reply!r} (right: {asked['label']!r})", flush=True)
        print(f"   chat page {address}/", flush=True)
        if stays:
            print("   Ctrl-C ends it", flush=True)
            signal.sigwait([signal.SIGINT, signal.SIGTERM])


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
    """Run a megatrain command to its end. Raises StageError if it fails."""
    code = subprocess.run(command(*words), check=False).returncode
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
