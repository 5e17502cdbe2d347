"""Show the main job in five minutes: prepare text, pretrain with ZeRO-3 on two processes, stop, resume, score, sample.

Started by tools/quickstart.sh. Everything it does is a `megatrain` command that it prints first; the comparison with
general-purpose compressors is the only code of its own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

DATASET = Path("data/quickstart")
RUN = Path("runs/quickstart")
STOP_AT = 0.3
"""Share of the run after which it is stopped once."""
PREPARE = ["data=python_stdlib", "data.name=quickstart", "tokenizer.vocab_size=2048"]


def main() -> int:
    """Run all steps; return the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="further overrides of the training command, e.g. train.steps=50")
    arguments = parser.parse_args()
    started = time.monotonic()
    say("1/5 prepare the text of Python's own standard library")
    if code := megatrain("prepare", *PREPARE):
        return code
    train = ["train", "experiment=quickstart", f"launch.nproc_per_node={num_processes()}", *arguments.overrides]
    say(f"2/5 pretrain on {num_processes()} processes with DeepSpeed ZeRO-3; stopped once on the way and resumed")
    if code := train_with_a_stop(train):
        return code
    say("3/5 score the held-out files")
    bits = evaluate()
    if bits is None:
        return 1
    say("4/5 a sample from the model")
    if code := megatrain("generate", str(RUN), "prompt=def ", "max_new_tokens=160", "temperature=0.7", "top_k=50"):
        return code
    say("5/5 a page that shows the run")
    if code := megatrain("report", str(RUN)):
        return code
    summary(bits, time.monotonic() - started)
    return 0


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


def num_processes() -> int:
    """Return one process per GPU, or two on the CPU."""
    listed = (
        subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        if which("nvidia-smi")
        else None
    )
    gpus = len(listed.stdout.strip().splitlines()) if listed and listed.returncode == 0 else 0
    return gpus or 2


def which(program: str) -> bool:
    """Return whether a program is on the path."""
    return any((Path(folder) / program).exists() for folder in os.environ.get("PATH", "").split(os.pathsep))


def command(*words: str) -> list[str]:
    """Return a megatrain command for this interpreter, and print it as a user would type it."""
    print("$ megatrain " + shlex.join(words), flush=True)
    return [sys.executable, "-m", "megatrain", *words]


def megatrain(*words: str) -> int:
    """Run a megatrain command to its end."""
    return subprocess.run(command(*words), check=False).returncode


def train_with_a_stop(train: list[str]) -> int:
    """Train, send SIGTERM part of the way, and give the same command again; exit code 75 says "saved after a
    signal"."""
    total = total_steps(train)
    if total is None:
        return 2
    if steps_done() >= STOP_AT * total:  # a second start of the quickstart
        return megatrain(*train)
    process = subprocess.Popen(command(*train))
    while process.poll() is None and steps_done() < STOP_AT * total:
        time.sleep(0.2)
    if process.poll() is None:
        print(f"   (quickstart: SIGTERM at step {steps_done()}, as a cluster would before its time limit)", flush=True)
        process.send_signal(signal.SIGTERM)
    code = process.wait()
    if code != 75:
        return code
    print("   (quickstart: exit code 75, saved after a signal; the same command continues)", flush=True)
    return megatrain(*train)


def total_steps(train: list[str]) -> int | None:
    """Return `train.steps` of the resolved config."""
    import yaml

    shown = subprocess.run(
        [sys.executable, "-m", "megatrain", *train, "--cfg"], capture_output=True, text=True, check=False
    )
    if shown.returncode:
        print(shown.stderr, file=sys.stderr, end="")
        return None
    return int(yaml.safe_load(shown.stdout)["train"]["steps"])


def steps_done() -> int:
    """Return the number of lines in the run's metrics so far."""
    metrics = RUN / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def evaluate() -> float | None:
    """Return the bits per byte of the whole held-out split."""
    result = subprocess.run(command("evaluate", str(RUN)), stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        return None
    return float(json.loads(result.stdout.strip().splitlines()[-1])["bits_per_byte"])


def heldout_files() -> list[bytes]:
    """Return the held-out files, decoded from the dataset: the text that the model was scored on."""
    from megatrain.data.tokenizer_loading import load_tokenizer

    tokenizer = load_tokenizer(DATASET / "tokenizer")
    card = json.loads((DATASET / "card.json").read_text())
    ids = np.fromfile(DATASET / "heldout.bin", dtype=card["splits"]["heldout"]["dtype"])
    ends = np.flatnonzero(ids == tokenizer.end_of_document)
    documents = np.split(ids, ends + 1)
    return [tokenizer.decode(document[:-1].tolist()).encode() for document in documents if len(document)]


def summary(bits: float, seconds: float) -> None:
    """Print the scores side by side and where every result is."""
    files = heldout_files()
    size = sum(map(len, files))
    whole = b"".join(files)
    say(f"held-out score: {len(files)} files, {size:,} bytes the model has never seen")
    print(f"   {'bits per byte':<16}{'each file alone':>18}{'all together':>16}")
    for name, compress in (
        ("gzip -9", lambda data: gzip.compress(data, 9)),
        ("xz -9", lambda data: lzma.compress(data, preset=9)),
    ):
        alone = sum(len(compress(data)) for data in files)
        print(f"   {name:<16}{8 * alone / size:>18.3f}{8 * len(compress(whole)) / size:>16.3f}")
    print(f"   {'this model':<16}{bits:>18.3f}{bits:>16.3f}")
    report, checkpoints = (RUN / "report.html").resolve(), (RUN / "checkpoints").resolve()
    print(f"\n   report        {report}\n   checkpoints   {checkpoints}")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{RUN.parent.resolve()}/mlflow.db"
    ui = Path(sys.executable).parent / "mlflow"
    print(f"   MLflow        {ui} ui --backend-store-uri {uri}")
    print(f"\n   {seconds:.0f} s in all", flush=True)


if __name__ == "__main__":
    sys.exit(main())
