"""What slurm/train.sbatch asks before it requeues a job.

Prints one line for the shell, `step=<n> limit=<n> exclude=<nodes>`: the furthest step that any start of the run has
finished, `launch.max_requeues`, and the nodes, separated by commas, that had faults of the machine more than once in a
day. Imports no torch.
"""

from __future__ import annotations

import time
from pathlib import Path

from megatrain.config.compose import compose
from megatrain.resilience.failure import suspects
from megatrain.resilience.ledger import DAMAGE, FILE, read_ledger
from megatrain.tracking.events import read_events


def furthest_step(run_dir: Path) -> int:
    """Return the furthest step that a start of the run has finished; 0 if there is none, or no readable ledger."""
    try:
        agents = read_ledger(run_dir / FILE)["agents"]
        return max((int(start.get("done", 0)) for agent in agents for start in agent["starts"]), default=0)
    except (OSError, *DAMAGE):
        return 0


def suspected_nodes(run_dir: Path) -> list[str]:
    """Return the nodes that had faults of the machine more than once in a day."""
    try:
        events = read_events(run_dir / "events.jsonl")
    except OSError:
        return []
    hosts = {str(event["host"]) for event in events if event["kind"] == "failure" and "host" in event}
    return suspects(hosts, events, time.time())


def main(overrides: list[str]) -> None:
    """Print what is known of the run that these overrides of `megatrain train` name."""
    config = compose("train", overrides)
    run_dir = Path(config.run.dir) / str(config.run.name)
    nodes = ",".join(suspected_nodes(run_dir))
    print(f"step={furthest_step(run_dir)} limit={config.launch.max_requeues} exclude={nodes}")
