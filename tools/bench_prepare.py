"""Measure `megatrain prepare` against a plain single-process loop over the same files, interleaved in one run.

    python tools/bench_prepare.py [--megabytes 40] [--rounds 3] [--workers N]

The plain loop is what one would write by hand: read a line of JSON, call SentencePiece's `encode`, append an end token,
`tofile`. It does not normalise, deduplicate, hold out, check or hash anything. Both use the same trained tokenizer. The
table gives the medians of the rounds, in MB of text per second and in CPU seconds. The text is the standard library's
source, repeated with a different first line each time so that no two documents are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.preparation import prepare
from megatrain.distributed.rank_environment import usable_cores


def corpus(path: Path, megabytes: float) -> int:
    """Write a `.jsonl` with at least `megabytes` MB of text and return its text bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) + sorted(
        Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*/*.py")
    )
    texts = [text for file in files if 500 < len(text := file.read_text(encoding="utf-8", errors="replace")) < 200_000]
    written = number = 0
    with open(path, "w", encoding="utf-8") as out:
        while written < megabytes * 1e6:
            text = f"# {number}\n{texts[number % len(texts)]}"
            out.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            number += 1
    return written


def plain(path: Path, model: Path, out: Path) -> None:
    """Tokenize a file with the plain loop."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    end = processor.eos_id()
    with open(path, encoding="utf-8") as lines, open(out, "wb") as file:
        for line in lines:
            ids = processor.encode(json.loads(line)["text"])
            ids.append(end)
            np.array(ids, dtype=np.uint16).tofile(file)


def ours(path: Path, model: Path | None, folder: Path, name: str, workers: int) -> Path:
    """Tokenize the same file with `megatrain prepare`."""
    data = DataConfig(name=name, dir=str(folder), kind="files", paths=[str(path)], workers=workers, overwrite=True)
    tokenizer = TokenizerConfig(path=str(model) if model else None, train_bytes=8 * 2**20)
    return prepare(PrepareConfig(data=data, tokenizer=tokenizer))


def timed(function: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Return the wall-clock seconds of one call, and the CPU seconds of this process and its finished children."""
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    function(*arguments)
    return time.perf_counter() - start, sum(os.times()[:4]) - cpu


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=usable_cores())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = folder / "corpus.jsonl"
        size = corpus(path, given.megabytes)
        model = ours(path, None, folder, "first", given.workers) / "tokenizer" / "tokenizer.model"
        counts = sorted({1, given.workers})
        runs: dict[str, list[tuple[float, float]]] = {"plain loop, 1 process": []}
        runs |= {f"prepare, {n} workers": [] for n in counts}
        for _ in range(given.rounds):
            runs["plain loop, 1 process"].append(timed(plain, path, model, folder / "plain.bin"))
            for n in counts:
                runs[f"prepare, {n} workers"].append(timed(ours, path, model, folder, "again", n))
    rates = {name: size / 1e6 / statistics.median(wall for wall, _ in values) for name, values in runs.items()}
    base = rates["plain loop, 1 process"]
    print(f"{size / 1e6:.1f} MB of text, {given.rounds} rounds, {os.cpu_count()} CPUs, Python {sys.version.split()[0]}")
    print(f"load average at the end {os.getloadavg()[0]:.1f}")
    print(f"{'':24}{'MB/s':>8}{'x plain':>10}{'CPU s':>8}   seconds of each round")
    for name, rate in rates.items():
        cpu = statistics.median(cpu for _, cpu in runs[name])
        walls = ", ".join(f"{wall:.1f}" for wall, _ in runs[name])
        print(f"{name:24}{rate:8.2f}{rate / base:10.2f}{cpu:8.1f}   {walls}")


if __name__ == "__main__":
    main()
