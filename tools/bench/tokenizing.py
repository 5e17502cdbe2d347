"""`megatrain prepare` against a plain loop over tokenizers and datatrove: python tools/bench/tokenizing.py

All three read the same JSONL, encode it with the same byte-level BPE and write token ids, as whole processes that take
turns, each in one process (ours with data.workers=1, datatrove with one worker). The plain loop is what one would write
by hand: json.loads, Tokenizer.encode, an end token, tofile. datatrove is its DocumentTokenizer without shuffling; the
row is left out where `--datatrove` names no Python that has it. The ids must be equal. The text is the standard
library's source, normalised and repeated with another first line each time, so that no two documents are equal.
prepare also does what it does by default: normalise, look for duplicates, hash. A ratio is the peer's time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
from intervals import median_interval

from megatrain.data.corpus.normalise import normalise

END = "<|endoftext|>"

PLAIN = """
import json, sys
import numpy as np
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
end = tokenizer.token_to_id(sys.argv[4])
with open(sys.argv[1], encoding="utf-8") as lines, open(sys.argv[3], "wb") as out:
    for line in lines:
        ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
        np.array([*ids, end], dtype=np.uint16).tofile(out)
"""

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from pathlib import Path
if __name__ == "__main__":
    source, tokenizer, out, end = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(Path(source).parent), glob_pattern=Path(source).name),
            DocumentTokenizer(out, tokenizer_name_or_path=tokenizer, eos_token=end, shuffle_documents=False),
        ],
        tasks=1, workers=1, logging_dir=out + ".logs",
    ).run()
"""


def write_corpus(path: Path, megabytes: float) -> int:
    """Write a `.jsonl` with at least `megabytes` MB of text and return its bytes of text."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py"))
    read = (normalise(file.read_text(encoding="utf-8", errors="replace")) for file in files)
    texts = [text for text in read if 500 < len(text) < 200_000]
    written = number = 0
    with open(path, "w", encoding="utf-8") as out:
        while written < megabytes * 1e6:
            text = f"# {number}\n{texts[number % len(texts)]}"
            out.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            number += 1
    return written


def train_tokenizer(corpus: Path, path: Path) -> None:
    """Train byte-level BPE of 16,384 tokens, as GPT-2's, on the first documents of the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16384,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(corpus, encoding="utf-8") as lines:
        tokenizer.train_from_iterator(
            (json.loads(line)["text"] for line, _ in zip(lines, range(800), strict=False)), trainer
        )
    tokenizer.save(str(path))
    (path.parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))


def run(command: list[str], log: Path) -> tuple[float, float]:
    """Run a process to its end and return its wall and CPU seconds, those of its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    environ = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environ)
    if done.returncode:
        sys.exit(f"{command[:3]} ended with {done.returncode}:\n{log.read_text(errors='replace')[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def main() -> None:
    """Take turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=48, help="MB of text (default 48)")
    parser.add_argument("--turns", type=int, default=6, help="turns of each (default 6)")
    parser.add_argument("--datatrove", default=sys.executable, help="a Python that has datatrove (default: this one)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megatrain-tokenizing-") as name:
        folder = Path(name)
        corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.json"
        size = write_corpus(corpus, given.megabytes)
        train_tokenizer(corpus, tokenizer)
        ours = [
            sys.executable, "-m", "megatrain", "prepare", "data=files", f"data.paths=[{corpus}]", f"data.dir={folder}",
            "data.name=ours", "data.heldout_fraction=0", "data.workers=1", "data.overwrite=true", "tokenizer.kind=hf",
            f"tokenizer.path={tokenizer}",
        ]  # fmt: skip
        commands = {
            "prepare": ours,
            "plain loop": [sys.executable, "-c", PLAIN, str(corpus), str(tokenizer), str(folder / "plain.bin"), END],
        }
        script = folder / "peer.py"
        script.write_text(DATATROVE)
        peer = [given.datatrove, str(script), str(corpus), str(tokenizer), str(folder / "datatrove"), END]
        if subprocess.run([given.datatrove, "-c", "import datatrove"], capture_output=True).returncode == 0:
            commands["datatrove"] = peer
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(given.turns):
            for name, command in commands.items():
                for left in (folder / "datatrove", folder / "datatrove.logs"):
                    shutil.rmtree(left, ignore_errors=True)
                times[name].append(run(command, folder / "log"))
        equal = (folder / "plain.bin").read_bytes() == (folder / "ours" / "train.bin").read_bytes()
        tokens = np.fromfile(folder / "plain.bin", np.uint16)
        if "datatrove" in commands:
            (written,) = (folder / "datatrove").glob("*.ds")
            theirs = np.fromfile(written, np.uint16)
            equal = equal and np.array_equal(theirs, tokens)
    print(f"{size / 1e6:.1f} MB of text, {len(tokens):,} tokens, ids {'equal' if equal else 'DIFFERENT'}")
    print(f"{given.turns} turns, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {datetime.now():%Y-%m-%d}")
    for name, measured in times.items():
        wall, cpu = (median_interval([pair[which] for pair in measured]) for which in (0, 1))
        ratio = ""
        if name != "prepare":
            pairs = zip(measured, times["prepare"], strict=True)
            ratio = f", {median_interval([theirs[0] / ours[0] for theirs, ours in pairs])} x ours"
        print(f"{name:12}{size / 1e6 / wall.value:7.2f} MB/s, {wall.value:6.1f} s, CPU {cpu.value:6.1f} s{ratio}")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
