"""Jobs with ranks that fail on purpose; see inject/sitecustomize.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

from commands import megatrain


def fault(rank, step, phase, do, times=1, by=None):
    return {"rank": rank, "step": step, "phase": phase, "do": do, "times": times, "by": by}


def run_with(folder, faults, *words):
    """`megatrain` in `folder`, its ranks failing as the `faults` say, each so many times over all starts."""
    name = next(word.partition("=")[2] for word in words if word.startswith("run.name="))
    here = filter(None, [os.environ.get("PYTHONPATH")])
    done = folder / f"faults_{name}"
    done.mkdir(exist_ok=True)
    environ = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "inject"), *here]),
        "FAULTS": json.dumps(faults),
        "FAULTS_DONE": str(done),
    }
    return megatrain(folder, *words, environ=environ)
