"""Which GPUs a process of this machine can see through CUDA at most, and why not more. Imports no torch.

The answer comes from the installed build of torch, the environment and the device files, so that it is there before a
process starts. Only torch knows whether a driver works (`devices.py`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

DEVICES = Path("/dev")

OTHER_DRIVERS = ("dxg", "kfd")
"""Device files of drivers that show no /dev/nvidia*: that of Windows (WSL), and AMD's."""

VARIABLE = "CUDA_VISIBLE_DEVICES"

NUMBER = re.compile(r"\+?\d+")
"""How an entry of `VARIABLE` begins that names a GPU by its number. CUDA ignores what follows it in the entry."""

NAMES = ("GPU-", "MIG-")
"""How other entries begin that name a GPU."""


@dataclass(frozen=True)
class Limit:
    """The most GPUs that a process can see, the reason for this limit, and what to do about it."""

    most: int
    reason: str
    remedy: str


def limit(environ: Mapping[str, str] = os.environ) -> Limit | None:
    """Return the lowest limit on the GPUs that a process can see; None if nothing here sets one."""
    found = [_limit_of_torch(), _limit_of_environment(environ), _limit_of_system()]
    return min((one for one in found if one is not None), key=lambda one: one.most, default=None)


def too_few(key: str, needed: int, place: str, found: Limit) -> str:
    """Return the message for a job that needs more GPUs than a machine (`place`) has for it.

    `key` is the choice that asks for GPUs, such as `launch.device=cuda`.
    """
    gpus = f"{needed} GPUs on {place}, one for each rank" if needed > 1 else f"a GPU on {place}"
    have = f"at most {found.most} can be used" if found.most else "none can be used"
    otherwise = f"launch.nproc_per_node={found.most}" if found.most else "launch.device=cpu"
    return f"{key} needs {gpus}, but {have}: {found.reason}; {found.remedy}, or give {otherwise}"


def _limit_of_torch() -> Limit | None:
    """Return the limit of a torch that was built for CPUs. Its version file is read, not imported."""
    spec = find_spec("torch")
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8") if spec and spec.origin else ""
    except OSError:
        return None
    builds = dict(re.findall(r"^(cuda|hip|__version__)\b[^=\n]*=\s*(.+)$", text, flags=re.MULTILINE))
    if builds.get("cuda") != "None" or builds.get("hip", "None") != "None":
        return None
    version = builds.get("__version__", "").strip("'\"")
    return Limit(0, f"the installed torch {version} is built for CPUs only", "install a torch that is built for CUDA")


def _limit_of_environment(environ: Mapping[str, str]) -> Limit | None:
    """Return the limit that CUDA_VISIBLE_DEVICES sets."""
    value = environ.get(VARIABLE)
    if value is None:
        return None
    if not value:
        return Limit(0, f"{VARIABLE} is set, but empty, and shows none", f"unset {VARIABLE}, or list GPUs in it")
    named = _named(value)
    if twice := next((one for at, one in enumerate(named) if one in named[:at]), None):
        return Limit(
            0, f"{VARIABLE}={value} names {twice} twice, and then CUDA shows none", f"list each GPU once in {VARIABLE}"
        )
    return Limit(
        len(named),
        f"{VARIABLE}={value} shows {len(named) or 'none'}",
        f"unset {VARIABLE}, or list more GPUs in it",
    )


def _named(value: str) -> list[str]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES names, as CUDA reads it.

    They are numbers, or names that all begin alike; entries after the first other one (-1, NoDevFiles) do not count.
    """
    prefix = next((prefix for prefix in NAMES if value.startswith(prefix)), None)
    found = []
    for entry in value.split(","):
        if prefix is not None:
            name = entry if entry.startswith(prefix) else None
        else:
            name = str(int(number[0])) if (number := NUMBER.match(entry.strip())) else None
        if name is None:
            break
        found.append(name)
    return found


def _limit_of_system() -> Limit | None:
    """Return the limit that the device files of the NVIDIA driver set (Linux)."""
    if sys.platform != "linux" or any((DEVICES / name).exists() for name in OTHER_DRIVERS):
        return None
    most = len(list(DEVICES.glob("nvidia[0-9]*")))
    if most:
        return Limit(most, f"the machine shows {most} (/dev/nvidia*)", "use a machine with more")
    return Limit(
        0,
        "there is no /dev/nvidia*, so the machine has no NVIDIA GPU, its driver is not loaded, or the container or job "
        "was given none",
        "if it should have one, look at nvidia-smi, start the container with GPUs (docker run --gpus all) or ask Slurm "
        "for them (--gpus-per-node)",
    )
