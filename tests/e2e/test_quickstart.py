"""The quickstart, shortened: it prepares, trains, stops and resumes, scores, samples and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "quickstart.py"


def test_the_quickstart_runs_every_step_that_it_announces(tmp_path):
    """One run folder has a start, a signal, a resume and an end; the output has the scores beside the compressors' and
    names every result."""
    short = ["train.steps=30", "optim.warmup_steps=5", "train.eval_every=0", "train.eval_steps=1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *short], cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "quickstart"
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert [kind for kind in kinds if kind in ("start", "signal", "resume", "stop")] == [
        "start", "signal", "stop", "resume", "stop",
    ]  # fmt: skip
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))
    rows = {
        line.split("  ")[1].strip(): line.split()[-2:] for line in done.stdout.splitlines() if line.startswith("   ")
    }
    for compressor in ("gzip -9", "xz -9"):
        alone, together = map(float, rows[compressor])
        assert 1.0 < together < alone < 3.0
    assert float(rows["this model"][0]) > 2.0, "thirty steps cannot beat gzip"
    for place in (run / "report.html", run / "checkpoints", tmp_path / "runs" / "mlflow.db"):
        assert place.exists() and str(place.parent) in done.stdout
