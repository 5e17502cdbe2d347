"""How fast a mixture of 100 datasets opens and is read: python tools/bench/reading.py

Opening: the cards and headers of 100 datasets of 10^10 tokens each (files with holes, which take no room on the disk),
the plan of a mixture of random weights, and the windows of a step of 1,024 samples. A figure is the CPU time and the
growth of the resident set of a fresh process that has imported everything.

Reading: a rank's stream of micro-batches from 100 datasets of 10^6 random tokens, over what the model trains at the
defaults with one thread, both in tokens a second of CPU time and in turns: 50 steps read, one trained. The verdict is
the median of the ratios with its interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from intervals import median_interval

from megatrain.config import TrainConfig
from megatrain.config.compose import compose
from megatrain.data.card import Card, SplitCard, TokenizerCard, card_of_written, fingerprint
from megatrain.data.indexed import BLOCK_BYTES, HEADER, MAGIC, IndexedWriter, dtype_code, pair
from megatrain.data.loader import TrainStream
from megatrain.distributed.world import World
from megatrain.engine.native import NativeEngine
from megatrain.optim.objective import NextToken
from megatrain.training.datasets import open_data

DATASETS = 100
VOCABULARY = 8192
DTYPE = np.dtype(np.uint16)
TOKENIZER = TokenizerCard("sentencepiece", "0" * 32, VOCABULARY, 0)

_STEPS = 50
"""Steps read in a turn: one is too short for the clock, and the stream reads a few more than it is asked for."""

OPEN = """
import json, sys, time
import numpy as np, psutil
from megatrain.config.compose import compose
from megatrain.training.datasets import open_data
config = compose("train", json.loads(sys.argv[1]))
np.unique(np.arange(3))  # numpy's own first call
process = psutil.Process()
before, start = process.memory_info().rss, time.process_time()
data = open_data(config)
windows = data.order.windows(np.arange(1024))
seconds = time.process_time() - start
print(json.dumps([seconds, process.memory_info().rss - before, data.train.num_samples * data.train.seq_len]))
"""


def write_card(folder: Path, split: SplitCard) -> None:
    """Make a folder with a train split a dataset."""
    splits = {"train": split}
    Card(folder.name, fingerprint(splits), splits, TOKENIZER).save(folder)


def make_hollow(folder: Path, number: int, tokens: int, document: int) -> None:
    """Make a dataset of zeros in documents of `document` tokens: files of holes but for the index's last entry."""
    folder.mkdir()
    bin_path, idx_path = pair(folder / "train")
    documents = tokens // document
    bin_size, idx_size = tokens * DTYPE.itemsize, HEADER.size + 20 * documents + 8
    with open(bin_path, "wb") as file:
        file.truncate(bin_size)
    with open(idx_path, "wb") as file:
        file.truncate(idx_size)
        file.write(HEADER.pack(MAGIC, 1, dtype_code(DTYPE), documents, documents + 1))
        file.seek(HEADER.size + 4 * (documents - 1))
        file.write(np.array([document], "<i4").tobytes())
        file.seek(HEADER.size + 4 * documents + 8 * (documents - 1))
        file.write(np.array([(tokens - document) * DTYPE.itemsize], "<i8").tobytes())
    hashes = [f"{number:08x}{block:08x}" for block in range(-(-bin_size // BLOCK_BYTES))]
    split = SplitCard(documents, tokens * 4, tokens, DTYPE.name, bin_size, idx_size, f"{number:032x}", hashes)
    write_card(folder, split)


def make_real(folder: Path, number: int, tokens: int) -> None:
    """Make a dataset of random tokens."""
    folder.mkdir()
    ids = np.random.default_rng(number).integers(1, VOCABULARY, tokens).astype(DTYPE)
    with IndexedWriter(folder / "train", DTYPE) as writer:
        writer.add(ids, np.full(tokens // 1000, 1000))
        writer.finish()
        write_card(folder, card_of_written(writer, tokens * 4))


def words(folder: Path, names: list[str], *more: str) -> list[str]:
    """Return overrides of `megatrain train` for a mixture of random weights."""
    draws = np.random.default_rng(0).random(len(names)) + 0.01
    weights = ", ".join(f"{name}: {weight:.4f}" for name, weight in zip(names, draws, strict=True))
    mixture = [f"data.dir={folder}", "data=mixture", f"data.mixture={{{weights}}}"]
    return [*mixture, "engine=native", "train.eval_every=0", *more]


def measure_opening(folder: Path, turns: int) -> str:
    """Return the sentence on opening."""
    names = [f"d{number:03d}" for number in range(DATASETS)]
    for number, name in enumerate(names):
        make_hollow(folder / name, number, 10**10, 1000)
    given = json.dumps(words(folder, names, "model=tiny", "train.seq_len=512"))
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", OPEN, given], check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(turns)
    ]
    seconds, growth = median_interval([run[0] for run in runs]), max(run[1] for run in runs)
    return (
        f"opening {DATASETS} datasets of {runs[0][2]:.3g} tokens in all and drawing 1,024 samples: CPU "
        f"{1e3 * seconds.value:.0f} [{1e3 * seconds.low:.0f}, {1e3 * seconds.high:.0f}] ms, {growth / 2**20:.1f} MiB"
    )


def measure_reading(folder: Path, model: str, turns: int) -> str:
    """Return the sentence on reading."""
    names = [f"r{number:03d}" for number in range(DATASETS)]
    for number, name in enumerate(names):
        make_real(folder / name, number, 10**6)
    config = compose("train", words(folder, names, f"model={model}"))
    assert isinstance(config, TrainConfig)
    data = open_data(config)
    loop, config = data.config.train, data.config
    size = 2 * loop.micro_batch_size
    stream = TrainStream(
        data.train, data.order, vocab_size=VOCABULARY, micro_batch_size=loop.micro_batch_size,
        dp_rank=0, dp_size=1, batch_size=lambda step: size, first_step=1, cursor=0,
    )  # fmt: skip
    torch.set_num_threads(1)
    engine = NativeEngine(config, World(0, 1, 0, torch.device("cpu"), None), NextToken())
    step, cursor, reading, training = 0, 0, [], []
    for _ in range(turns + 2):
        stream.restart(step + 1, cursor, ())
        start = time.process_time()
        for _ in range(_STEPS):
            batch = next(stream)
        reading.append((time.process_time() - start) / _STEPS)
        stream.close()  # so that it does not read while the model trains
        step, cursor = step + _STEPS, batch.cursor
        start = time.process_time()
        engine.train_step(batch.micro_batches, config.optim.lr, step)
        training.append(time.process_time() - start)
    tokens = size * loop.seq_len
    ratios = [train / read for train, read in zip(training[2:], reading[2:], strict=True)]
    return (
        f"reading, steps of {tokens} tokens (micro-batches of {loop.micro_batch_size} x {loop.seq_len}): "
        f"{tokens / np.median(reading[2:]) / 1e6:.1f} million tokens/s, {model} trains "
        f"{tokens / np.median(training[2:]):,.0f}: {median_interval(ratios)} times"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9, help="openings, and turns of reading and training (default 9)")
    parser.add_argument("--model", default="tiny", help="preset of conf/model that trains (default tiny)")
    parser.add_argument("--folder", help="where to make the files (default: the system's temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megatrain-reading-", dir=arguments.folder) as name:
        print(measure_opening(Path(name), arguments.turns))
        print(measure_reading(Path(name), arguments.model, arguments.turns))


if __name__ == "__main__":
    main()
