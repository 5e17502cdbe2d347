"""Measure the filters of the recipe `fineweb` against datatrove's pipeline of the same ones, on the same English JSONL.

    python tools/bench/cleaning.py [--megabytes 8] [--pairs 7] [--corpus english.jsonl]

Whole processes take turns in pairs, one worker each; each reads the file, filters, and writes what it keeps as JSONL.
The table has the median of each with its interval, in wall-clock and CPU seconds, and of the ratio of each pair. Then
come the share of documents with equal verdicts, and equal text, and each difference. Without `--corpus` the text is
what Python and its packages carry: docstrings, manuals and descriptions. Left out are the recipe's URL filter and the
extraction of text (the corpus has neither URLs nor HTML), languages (datatrove downloads its model) and addresses.

Run it on quiet cores: every second process is the other one, so drift hits both, but a neighbour's load does not.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import xxhash
from intervals import median_interval

ROOT = Path(__file__).resolve().parents[2]

OURS = """
import json, sys
from megatrain.config.choices import conf_folder, read_yaml
from megatrain.data.corpus.document import Document
from megatrain.data.corpus.recipe import build_recipe, new_reports, run_recipe
steps = read_yaml(conf_folder() / "clean" / "fineweb.yaml")[0]["steps"]
names = [step if isinstance(step, str) else next(iter(step)) for step in steps]
filters = ("gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality")
recipe = build_recipe([step for step, name in zip(steps, names) if name in filters])
reports = new_reports(recipe)
with open(sys.argv[1], encoding="utf-8") as lines, open(sys.argv[2], "w", encoding="utf-8") as kept:
    for line in lines:
        record = json.loads(line)
        document = Document(record["text"], record["id"])
        if run_recipe(recipe, document, reports, seed=0):
            kept.write(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\\n")
"""

THEIRS = """
import sys
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import (
    C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
source, target = map(Path, sys.argv[1:])
LocalPipelineExecutor(
    pipeline=[
        JsonlReader(str(source.parent), glob_pattern=source.name),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
        JsonlWriter(str(target.parent), output_filename=target.name, compression=None),
    ],
    tasks=1,
    workers=1,
    logging_dir=str(target.parent / "logs"),
).run()
"""


@dataclass(frozen=True)
class Turn:
    """What one process took, in seconds, and the texts it kept by id."""

    wall: float
    cpu: float
    kept: dict[str, str]


def english() -> Iterator[str]:
    """Yield the docstrings of each module, and the manuals and descriptions of packages, in a fixed order."""
    paths = sysconfig.get_paths()
    folders = [Path(paths["stdlib"]), Path(paths["purelib"])]
    files = {file for folder in folders for ending in ("py", "md", "rst") for file in folder.rglob(f"*.{ending}")}
    files |= set(folders[1].glob("*.dist-info/METADATA"))
    # by a hash of the path, so that the first megabytes have something of everything
    for file in sorted(files, key=lambda file: (hash_of(file.name + file.parent.name), str(file))):
        text = file.read_text(encoding="utf-8", errors="replace")
        if file.suffix == ".py":
            text = "\n\n".join(docstrings(text))
        elif file.name == "METADATA":
            text = text.partition("\n\n")[2]
        if len(text) >= 200:
            yield text


def hash_of(text: str) -> int:
    """Return a number that is the same in every process."""
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogateescape"))


def docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a Python source, without indentation."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield text


def write_corpus(path: Path, megabytes: float) -> None:
    """Write English documents as JSONL, of about as many megabytes of text."""
    left = megabytes * 1e6
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(english()):
            file.write(json.dumps({"id": str(number), "text": text}) + "\n")
            left -= len(text.encode(errors="replace"))
            if left <= 0:
                return


def take_turn(program: str, corpus: Path) -> Turn:
    """Run a program over the corpus in a process of its own."""
    with tempfile.TemporaryDirectory(dir=corpus.parent) as folder:
        target = Path(folder) / "kept.jsonl"
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", program, str(corpus), str(target)], env=environ, capture_output=True, text=True
        )
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit(f"a process failed:\n{done.stderr[-2000:]}")
        with target.open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Turn(wall, cpu, {record["id"]: record["text"] for record in records})


def differences(ids: list[str], ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Return a line for each document with another verdict, or another text."""
    found = []
    for name in ids:
        if (name in ours) != (name in theirs):
            found.append(f"{name}: {'kept' if name in ours else 'removed'} here, not by datatrove")
        elif ours.get(name) != theirs.get(name):
            found.append(f"{name}: kept by both, with another text")
    return found


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--corpus", type=Path, help="JSONL with id and text")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = given.corpus or Path(scratch) / "in" / "english.jsonl"
        if given.corpus is None:
            corpus.parent.mkdir()
            write_corpus(corpus, given.megabytes)
        report(corpus.resolve(), given.pairs)


def report(corpus: Path, pairs: int) -> None:
    """Run pairs of processes over a corpus, print the table and the differences."""
    with corpus.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    size = sum(len(record["text"].encode(errors="replace")) for record in records)
    turns: dict[str, list[Turn]] = {"megatrain": [], "datatrove": []}
    programs = {"megatrain": OURS, "datatrove": THEIRS}
    for number in range(pairs):
        for name in programs if number % 2 == 0 else reversed(programs):
            turns[name].append(take_turn(programs[name], corpus))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("datatrove", "spacy", "numpy"))
    print(
        f"{len(records)} documents, {size / 1e6:.1f} MB; {pairs} pairs; Python {platform.python_version()}, {versions}"
    )
    print(f"{os.cpu_count()} CPUs, load average at the end {os.getloadavg()[0]:.1f}")
    for measure in ("wall", "cpu"):
        for name, taken in turns.items():
            seconds = median_interval([getattr(turn, measure) for turn in taken])
            print(f"{measure:5}{name:10} {seconds} s, {size / 1e6 / seconds.value:.2f} MB/s")
        ours, theirs = ([getattr(turn, measure) for turn in taken] for taken in turns.values())
        ratio = median_interval([b / a for a, b in zip(ours, theirs, strict=True)])
        print(f"{measure:5}{'ratio':10} {ratio} times as fast as datatrove (interval of {ratio.coverage:.0%})")
    kept = {name: taken[0].kept for name, taken in turns.items()}
    found = differences([record["id"] for record in records], kept["megatrain"], kept["datatrove"])
    print(f"kept {len(kept['megatrain'])} and {len(kept['datatrove'])} documents")
    print(f"equal verdicts and texts: {1 - len(found) / len(records):.4%}")
    print(*found, sep="\n", end="\n" if found else "")


if __name__ == "__main__":
    main()
