"""Measure saving and loading against plain copies, writes and reads of the same bytes.

    python tools/measure_checkpoints.py

One process has the fp32 master weights and moments of a model. Each round measures three pairs:

- a plain copy in memory, and how long a background save blocks its caller;
- a plain sequential write, flushed to disk, and a complete save with checksums and manifest;
- a plain sequential read, and a complete load that verifies every checksum.

It prints the medians of the rounds' ratios. Reads come from the disk if this process may empty the page cache (root),
otherwise from memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatrain.checkpoint.manifest import Progress, RunRecord
from megatrain.checkpoint.saver import Saver
from megatrain.checkpoint.store import CheckpointStore, load_into
from megatrain.config import CheckpointConfig
from megatrain.config.compose import compose
from megatrain.distributed.world import World
from megatrain.model.count import parameter_shapes

BLOCK = 2**22


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def empty_page_cache() -> bool:
    """Empty the page cache and return whether that was allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def plain_write(path: Path, memory: memoryview) -> None:
    """Write the bytes in large blocks and flush them to disk."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(memory), BLOCK):
            file.write(memory[start : start + BLOCK])
        os.fsync(file.fileno())


def plain_read(path: Path, memory: memoryview) -> None:
    """Read the file into memory in large blocks."""
    with path.open("rb", buffering=0) as file:
        at = 0
        while count := file.readinto(memory[at : at + BLOCK]):
            at += count


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2_124m", help="preset whose parameters are saved")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder unless given")
    arguments = parser.parse_args()
    model = compose("train", [f"model={arguments.model}", "data.name=none", "model.vocab_size=50257"]).model
    state = {
        f"{kind}{name}": torch.randn(shape)
        for name, shape in parameter_shapes(model).items()
        for kind in ("model.", "optim.exp_avg.", "optim.exp_avg_sq.")
    }
    total = sum(tensor.nbytes for tensor in state.values())
    source, target = torch.randn(total // 4), torch.zeros(total // 4)
    memory = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        store = CheckpointStore(folder / "checkpoints", World(0, 1, 0, torch.device("cpu"), None))
        saver = Saver(store, CheckpointConfig(keep=1))
        first = saver.save(state, RunRecord(Progress(1)))
        saver.finish()
        rows: dict[str, list[tuple[float, float]]] = {"stall": [], "save": [], "load": []}
        emptied = False
        for step in range(2, arguments.rounds + 2):
            copy = seconds(lambda: target.copy_(source))
            stall = saver.save(state, RunRecord(Progress(step)))
            saver.finish()
            rows["stall"].append((stall, copy))
            (folder / "plain").unlink(missing_ok=True)  # write a new file, as a checkpoint does
            empty_page_cache()  # both writes start with an empty page cache
            write = seconds(lambda: plain_write(folder / "plain", memory))
            empty_page_cache()
            took = seconds(lambda step=step: store.save(state, RunRecord(Progress(step + 1000))))  # type: ignore[misc]
            store.retire(1, 0)
            rows["save"].append((took, write))
            emptied = empty_page_cache()
            read = seconds(lambda: plain_read(folder / "plain", memory))
            empty_page_cache()

            def load() -> None:
                found = store.newest_valid()
                assert found is not None
                load_into(*found, state, None)

            rows["load"].append((seconds(load), read))
        print(f"{arguments.model}: {total / 1e9:.2f} GB of fp32 masters and moments, {arguments.rounds} rounds")
        print(f"first stall {first:.3f} s (it allocates its memory)")
        print("| what | seconds | plain, same bytes | GB/s | ratio of the times (median of pairs) |")
        print("| --- | ---: | ---: | ---: | ---: |")
        names = {"stall": "stall of a save / copy in memory", "save": "save / write", "load": "verify and load / read"}
        for key, pairs in rows.items():
            own, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"| {names[key]} | {own:.3f} | {plain:.3f} | {total / own / 1e9:.2f} | {ratio:.2f} |")
        print(f"reads came from {'the disk' if emptied else 'the page cache, which this user may not empty'}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
