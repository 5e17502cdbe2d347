"""Identify this machine's arithmetic: recorded figures are bit-equal only on the processor and torch they came from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

KEYS = ("model name", "cpu family", "model", "stepping", "cache size", "flags")


def processor() -> str:
    """Return a name for torch's build, its instruction set and the processor: all three choose the kernels."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = dict(reversed([tuple(map(str.strip, line.split(":", 1))) for line in lines if ":" in line]))
    features = hashlib.sha256(repr([found.get(key) for key in KEYS]).encode()).hexdigest()[:16]
    return f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {found.get('model name')} {features}"
