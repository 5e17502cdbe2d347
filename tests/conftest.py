"""Shared by all tests: one thread a rank, and the helpers of this folder importable by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "parity")]
