"""Measure what fault tolerance costs when nothing fails: python tools/measure_resilience.py

It runs a real job of two ranks with copies of the state in memory. Every function that serves fault tolerance is timed
inside the ranks (heartbeat, timed waits, loss guard, slow ranks, the owner's mark), and the agent's processor time is
read. Each cost is shown as a share of the median step. Timing a call itself costs some tenths of a microsecond, which
are subtracted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMED = {
    "megatrain.resilience.heartbeat": [("Heartbeat", "enter"), ("Heartbeat", "waited")],
    "megatrain.resilience.guard": [("LossGuard", "judge"), ("LossGuard", "remember")],
    "megatrain.resilience.stragglers": [("Stragglers", "judge")],
    "megatrain.resilience.owner": [("Ownership", "check")],
    "megatrain.distributed.waits": [("Waits", "held_up")],
    "megatrain.checkpoint.saver": [("Saver", "copy")],
}
"""What stands in the way of a step, by module: classes and methods. A timed wait is measured by itself, for most of it
is the wait."""

FOLDER = "MEASURE_RESILIENCE"
"""Where ranks write what they timed, in their environment."""

totals: dict[str, list[float]] = {}
"""Seconds and calls of each timed method, in a rank."""


def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    total = totals.setdefault(name, [0.0, 0])

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            total[0] += time.perf_counter() - started
            total[1] += 1

    return call


def cost_of_timing() -> float:
    """Return the seconds that a timed call of an empty function seems to take."""
    nothing = timed("nothing", lambda: None)
    for _ in range(10000):
        nothing()
    seconds, calls = totals.pop("nothing")
    return seconds / calls


class Finder:
    """Times the methods of `TIMED` once their module is imported, and makes the trainer write the times at its end."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in TIMED and name != "megatrain.train.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def and_time(module: Any) -> None:
            execute(module)
            for owner, method in TIMED.get(name, []):
                kind = getattr(module, owner)
                setattr(kind, method, timed(f"{owner}.{method}", getattr(kind, method)))
            if name == "megatrain.train.trainer":
                run = module.Trainer.run

                def run_and_tell(trainer: Any) -> str:
                    try:
                        return str(run(trainer))
                    finally:
                        found = {"timing": cost_of_timing(), "wait": cost_of_a_timed_wait(), "totals": totals}
                        file = Path(os.environ[FOLDER]) / f"rank_{os.environ.get('RANK', '0')}.json"
                        file.write_text(json.dumps(found))

                module.Trainer.run = run_and_tell

        spec.loader.exec_module = and_time  # type: ignore[method-assign]
        return spec


def cost_of_a_timed_wait() -> float:
    """Return the seconds that timing an empty wait takes."""
    from megatrain.distributed.waits import Waits

    waits = Waits(lambda nanoseconds: None)
    wait = waits.timed(lambda: None)
    started = time.perf_counter()
    for _ in range(10000):
        wait()
    seconds = (time.perf_counter() - started) / 10000
    waits.close()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "overrides", nargs="*", help="overrides of megatrain train, for example model=small engine=native"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        folder = Path(name)
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(
            "import sys\n"
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "import measure_resilience\n"
            "sys.meta_path.insert(0, measure_resilience.Finder())\n"
        )
        (folder / "text").mkdir()
        for source in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
            (folder / "text" / f"{source.stem}.txt").write_bytes(source.read_bytes())
        megatrain = [sys.executable, "-m", "megatrain"]
        data = ["data=files", "data.name=text"]
        prepare = [*megatrain, "prepare", *data, "data.paths=[text/*.txt]", "tokenizer.vocab_size=1000"]
        subprocess.run(prepare, check=True, capture_output=True)
        words = [
            "run.name=timed", f"train.steps={arguments.steps}", "launch.nproc_per_node=2", "tracking=none",
            "checkpoint.every=0", "checkpoint.memory_every=10", "train.seq_len=256", "train.global_batch_size=16",
            "train.micro_batch_size=4", "train.eval_steps=1",
        ]  # fmt: skip
        environ = {**os.environ, "PYTHONPATH": str(folder / "hook"), FOLDER: name, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*megatrain, "train", *data, *words, *arguments.overrides], env=environ)
        agent_s = 0.0
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):  # it has just ended
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                agent_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            time.sleep(0.2)
        assert process.returncode == 0, process.returncode
        lines = (folder / "runs" / "timed" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines][5:]
        step = statistics.median(record["step_time_s"] for record in steps)
        found = json.loads((folder / "rank_0.json").read_text())
        tell(found, step, arguments.steps, agent_s, sum(record["step_time_s"] for record in steps))
    return 0


def tell(found: dict[str, Any], step: float, steps: int, agent_s: float, training_s: float) -> None:
    """Print the table of rank 0."""
    print(f"median step {step * 1e3:.1f} ms; peak memory of a rank {peak_gb():.2f} GB")
    print("| rank 0 | calls a step | us a step | share of a step |")
    print("| --- | ---: | ---: | ---: |")
    waits = found["totals"]["Heartbeat.waited"][1]
    rows = {name: (seconds - calls * found["timing"], calls) for name, (seconds, calls) in found["totals"].items()}
    rows["timing the waits (Waits.timed)"] = (waits * found["wait"], waits)
    whole = 0.0
    for name, (seconds, calls) in rows.items():
        whole += max(0.0, seconds)
        share = max(0.0, seconds) / steps / step
        print(f"| {name} | {calls / steps:.1f} | {max(0.0, seconds) / steps * 1e6:.1f} | {share:.3%} |")
    print(f"| all | | {whole / steps * 1e6:.1f} | {whole / steps / step:.3%} |")
    print(f"the agent's processor time, its start included: {agent_s:.2f} s beside {training_s:.1f} s of steps")


def peak_gb() -> float:
    """Return the largest resident size of any process of the job."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
