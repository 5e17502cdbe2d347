"""What the peers' processes share: the job, the tokens, and the report. Imports nothing of megatrain, because a peer
may have its own environment."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Job:
    """The contents of `job.json`: the model, the data and the number of steps."""

    def __init__(self, path: Path) -> None:
        self.values: dict[str, Any] = json.loads(path.read_text())
        self.ids = np.memmap(self.tokens, dtype=self.dtype, mode="r")
        self.num_windows = (len(self.ids) - 1) // self.seq_len

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    @property
    def num_micro_batches(self) -> int:
        """Return the number of micro-batches per step."""
        return int(self.global_batch // self.micro_batch)

    def window(self, number: int) -> Tensor:
        """Return the `seq_len + 1` tokens of a sample, int64."""
        start = number % self.num_windows * self.seq_len
        return torch.from_numpy(np.asarray(self.ids[start : start + self.seq_len + 1], dtype=np.int64))


def run(loop: Callable[[Job], dict[str, Any]]) -> None:
    """Read the job that the command line names, train it, and print the report as the last line.

    `loop` returns `ends`, the time.monotonic() at which each step ended, and what else there is to say.
    """
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    job = Job(Path(sys.argv[1]))
    report = loop(job)
    if job.device == "cuda":
        report["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    print("\n" + json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), **report}))


def now(device: str) -> float:
    """Return time.monotonic() once the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()
