"""`clean.dedup=minhash` against datatrove's MinHash stages: python tools/bench/deduplication.py --datatrove PYTHON

Both read the same JSONL, find near duplicates with 112 hashes of word 5-grams in 14 bands, and write the documents that
are left as JSONL, as whole processes of one worker that take turns. They hash the same words: datatrove gets a
tokenizer with a regular expression for them (its default, spaCy, is several times slower) and only lower-cases. Ours
also does what prepare does: NFC, exact duplicates, compressed text with checksums, verified pairs. Its row is left out
where `--datatrove` names no Python that has datatrove and xxhash 3. The text is made: words of a skewed vocabulary,
documents of about 2,500 characters, 1 in 8 a copy with 1 word in 100 replaced. Memory is the largest resident set of a
process. A ratio is datatrove's time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from intervals import median_interval

COPIES = 8
"""One document in so many is a near copy of one before it."""

OURS = """
import json, sys
from pathlib import Path
from megatrain.config import CleanConfig, DataConfig, PrepareConfig
from megatrain.data.corpus import pipeline
from megatrain.data.corpus.cleaned import unpack
from megatrain.data.corpus.near_duplicates import drop_near_duplicates
from megatrain.data.corpus.selection import TRAIN, Selection
from megatrain.data.corpus.sources import open_source
from megatrain.data.corpus.worker_pool import Workers
source, out, memory = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
out.mkdir()
config = PrepareConfig(
    data=DataConfig(name="d", kind="files", paths=[source]), clean=CleanConfig(dedup="minhash", dedup_memory_mb=memory)
)
with Workers(1) as pool:
    shards = pipeline.clean_source(open_source(config.data), config, pool, out / "cleaned")
selection = Selection(shards, out / "flags")
selection.drop_duplicates(memory * 2**20)
signing = pipeline.signing_of(config)
drop_near_duplicates(selection, config.clean.minhash, signing, memory * 2**20, out / "bands")
with open(out / "kept.jsonl", "w", encoding="utf-8") as kept:
    for number, shard in enumerate(shards):
        flags = iter(selection.flags_of(number).tolist())
        for frame in shard.frames:
            for text in unpack(shard.text_path, frame):
                if next(flags) == TRAIN:
                    kept.write(json.dumps({"text": text.decode()}) + "\\n")
"""

DATATROVE = """
import re, sys
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer

class Words(WordTokenizer):
    find = re.compile("[^\\\\W_]+").findall
    def word_tokenize(self, text):
        return self.find(text)
    def sent_tokenize(self, text):
        raise NotImplementedError
    def span_tokenize(self, text):
        raise NotImplementedError

if __name__ == "__main__":
    source, out = Path(sys.argv[1]), sys.argv[2]
    norm = TextNormConfig(
        norm_whitespace=False, remove_punctuation=False, norm_unicode_diacritics=False, norm_numbers=False
    )
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, norm_config=norm)
    reader = lambda: JsonlReader(str(source.parent), glob_pattern=source.name)
    writer = JsonlWriter(out + "/kept", output_filename="kept.jsonl", compression=None)
    stages = [
        ([reader(), MinhashDedupSignature(out + "/signatures", config=config, language=Words())], 1),
        ([MinhashDedupBuckets(out + "/signatures", out + "/buckets", config=config)], 14),
        ([MinhashDedupCluster(out + "/buckets", out + "/remove", config=config)], 1),
        ([reader(), MinhashDedupFilter(out + "/remove"), writer], 1),
    ]
    for number, (pipeline, tasks) in enumerate(stages):
        LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=f"{out}/logs{number}").run()
"""


@dataclass(frozen=True)
class Turn:
    """A process's wall and CPU seconds, peak resident set in bytes, and the documents that it kept."""

    wall: float
    cpu: float
    memory: int
    kept: int


def write_corpus(path: Path, megabytes: float) -> tuple[int, int, int]:
    """Write made documents of at least `megabytes` MB in all; return their bytes, their number and the copies."""
    draws = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    vocabulary = ["".join(draws.choice(letters, size)) for size in draws.integers(2, 11, 50_000)]
    written = number = copies = 0
    words: list[str] = []
    with open(path, "w", encoding="utf-8") as out:
        while written < megabytes * 1e6:
            if number % COPIES == COPIES - 1:
                words = list(words)
                for at in draws.integers(0, len(words), max(1, len(words) // 100)):
                    words[at] = vocabulary[int(draws.integers(len(vocabulary)))]
                copies += 1
            else:
                size = int(draws.lognormal(5.7, 0.6)) + 20
                chosen = (len(vocabulary) * draws.random(size) ** 3).astype(np.int64)
                words = [vocabulary[place] for place in chosen.tolist()]
            lines = [" ".join(words[at : at + 12]).capitalize() + "." for at in range(0, len(words), 12)]
            text = "\n".join(lines)
            out.write(json.dumps({"text": text}) + "\n")
            written += len(text)
            number += 1
    return written, number, copies


def run(command: list[str], kept: Path, log: Path) -> Turn:
    """Run a process to its end."""
    environ = os.environ | {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    start = time.perf_counter()
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environ)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[:2]} ended with {process.returncode}:\n{log.read_text(errors='replace')[-2000:]}")
    with open(kept, "rb") as lines:
        count = sum(1 for _ in lines)
    return Turn(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, count)


def main() -> None:
    """Take turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=64, help="MB of text (default 64)")
    parser.add_argument("--turns", type=int, default=6, help="turns of each (default 6)")
    parser.add_argument("--memory", type=int, default=256, help="clean.dedup_memory_mb of ours (default 256)")
    parser.add_argument("--datatrove", default=sys.executable, help="a Python that has datatrove (default: this one)")
    parser.add_argument("--folder", help="where to make the files (default: the system's temporary folder)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megatrain-deduplication-", dir=given.folder) as name:
        folder = Path(name)
        corpus, scripts = folder / "corpus.jsonl", {"ours": OURS, "datatrove": DATATROVE}
        size, documents, copies = write_corpus(corpus, given.megabytes)
        for which, script in scripts.items():
            (folder / f"run_{which}.py").write_text(script)
        contenders = {
            "ours": ([sys.executable, str(folder / "run_ours.py"), str(corpus)], Path("kept.jsonl")),
            "datatrove": ([given.datatrove, str(folder / "run_datatrove.py"), str(corpus)], Path("kept", "kept.jsonl")),
        }
        if subprocess.run([given.datatrove, "-c", "import datatrove, xxhash"], capture_output=True).returncode:
            del contenders["datatrove"]
        turns: dict[str, list[Turn]] = {which: [] for which in contenders}
        for _ in range(given.turns):
            for which, (command, kept) in contenders.items():
                work = folder / f"{which}.work"
                shutil.rmtree(work, ignore_errors=True)
                turns[which].append(run([*command, str(work), str(given.memory)], work / kept, folder / "log"))
    print(f"{size / 1e6:.1f} MB of text, {documents:,} documents, {copies:,} of them copies")
    print(f"{given.turns} turns, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {datetime.now():%Y-%m-%d}")
    for which, measured in turns.items():
        wall, cpu = (median_interval([getattr(turn, part) for turn in measured]) for part in ("wall", "cpu"))
        ratio = ""
        if which != "ours":
            pairs = list(zip(measured, turns["ours"], strict=True))
            ratio = f"; over ours: wall {median_interval([theirs.wall / ours.wall for theirs, ours in pairs])}, CPU "
            ratio += f"{median_interval([theirs.cpu / ours.cpu for theirs, ours in pairs])}"
        print(
            f"{which:10}{documents / wall.value:8,.0f} documents/s, {wall.value:6.1f} s, CPU {cpu.value:6.1f} s, "
            f"{max(turn.memory for turn in measured) / 2**20:,.0f} MiB, kept {measured[0].kept:,}{ratio}"
        )


if __name__ == "__main__":
    main()
