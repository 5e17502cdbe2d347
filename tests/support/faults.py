"""Jobs with ranks that fail on purpose; see inject/sitecustomize.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from support.commands import megatrain


def fault(rank, step, phase, do, times=1, by=None, where=None):
    return {"rank": rank, "step": step, "phase": phase, "do": do, "times": times, "by": by, "where": where}


def injected(folder, name, faults):
    """Return the environment in which ranks of run `name` fail as `faults` says, counted over all starts."""
    done = folder / f"faults_{name}"
    done.mkdir(exist_ok=True)
    paths = [str(Path(__file__).parent / "inject"), os.environ.get("PYTHONPATH")]
    return {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "FAULTS": json.dumps(faults),
        "FAULTS_DONE": str(done),
    }


def run_with(folder, faults, *words, environ=None):
    """Run `megatrain` in `folder` with ranks that fail as `faults` says."""
    name = next(word.partition("=")[2] for word in words if word.startswith("run.name="))
    return megatrain(folder, *words, environ={**injected(folder, name, faults), **(environ or {})}, timeout=480)


def preloaded(source, folder):
    """Return the environment in which every process of a job calls the C functions of `inject/<source>` instead of the
    system's."""
    library = folder / Path(source).with_suffix(".so").name
    source = Path(__file__).parent / "inject" / source
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}
