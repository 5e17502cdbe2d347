"""What the agent tells users of a stop that a signal asked for. Imports no torch."""

from __future__ import annotations

import signal
from pathlib import Path

from megatrain.checkpoint.naming import checkpoint_step, list_checkpoints
from megatrain.resilience.heartbeat import Beat

STOPPING = "stopping: the ranks save and end; press Ctrl-C again to stop without saving"
"""After the first Ctrl-C."""


def long_stop(waited_s: float, beat: Beat, interrupted: bool) -> str:
    """Return what the ranks do that were asked to stop `waited_s` seconds ago; `beat` is rank 0's heartbeat."""
    how = "another Ctrl-C" if interrupted else "Ctrl-C twice"
    return (
        f"asked to stop {waited_s:.0f} s ago, and rank 0 is in step {beat.step} ({beat.phase}): the run saves and ends "
        f"once the step is done; {how} ends it without saving"
    )


def cut_short(run_dir: Path, done: int) -> str:
    """Return what a second Ctrl-C has left of a run whose last finished step is `done` (0: none in this start)."""
    saved = next((checkpoint_step(path) or 0 for path in list_checkpoints(run_dir / "checkpoints")), None)
    if saved is None:
        return "stopped without saving (second Ctrl-C)"
    if saved >= done:
        return f"stopped (second Ctrl-C); the checkpoint of step {saved} is complete, and no later step was done"
    return (
        f"stopped without saving (second Ctrl-C); the last step was {done}, and the next start continues from the "
        f"checkpoint of step {saved}"
    )


def outside_training(number: int, interrupted: bool) -> str:
    """Return the notice after a signal that ended a rank at once, because there was nothing to save.

    After Ctrl-C, where `interrupted`, the ranks are sent SIGTERM.
    """
    name = "Ctrl-C" if interrupted else signal.Signals(number).name
    return f"stopped by {name} before training began or after its end; start again to continue"
