"""Makes ranks of a job under test fail, for real, at an exact place. Every Python process with this folder on its path reads it.

`FAULTS` in the environment is a JSON list; each fault has `rank`, `step`, `phase` (of `resilience.heartbeat.PHASES`), what to
`do` (a signal's name, `sleep`, `run` with a shell command `by`, or `add` or `multiply` with a number `by`: to the loss of a micro-batch, as the model computes
it) and how many `times` (1 unless given), counted over all starts by files in `FAULTS_DONE`.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

FAULTS = json.loads(os.environ.get("FAULTS", "[]"))


TO_THE_LOSS = ("add", "multiply")
place = (None, None, None)
"""The rank, step and phase that this process is in."""


def first_time(number, times):
    """Whether fault `number` has struck less often than it may; counts this time."""
    for time_ in range(times):
        try:
            os.close(os.open(f"{os.environ['FAULTS_DONE']}/{number}.{time_}", os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            continue
    return False


def due(to_the_loss):
    """The faults that strike here and now; they count as done."""
    return [
        fault
        for number, fault in enumerate(FAULTS)
        if (fault["do"] in TO_THE_LOSS) == to_the_loss
        and place == (fault["rank"], fault["step"], fault["phase"])
        and first_time(number, fault.get("times", 1))
    ]


def strike(fault):
    if fault["do"] == "sleep":
        time.sleep(3600)
    if fault["do"] == "run":
        subprocess.run(fault["by"], shell=True, check=True)
        return
    os.kill(os.getpid(), getattr(signal, fault["do"]))


def watch_the_place(module):
    """Each mark of the heartbeat is a place to fail at."""
    enter = module.Heartbeat.enter

    def enter_and_fail(heartbeat, phase, step=None):
        global place
        enter(heartbeat, phase, step)
        place = (int(os.environ.get("RANK", -1)), heartbeat.step, phase)
        for fault in due(to_the_loss=False):
            strike(fault)

    module.Heartbeat.enter = enter_and_fail


def spoil_the_loss(module):
    """The loss, and where it is multiplied its gradient too, is not what the model gave."""
    true = module.cross_entropy_sum

    def spoiled(*given):
        loss = true(*given)
        for fault in due(to_the_loss=True):
            loss = loss + float(fault["by"]) if fault["do"] == "add" else loss * float(fault["by"])
        return loss

    module.cross_entropy_sum = spoiled


class Finder:
    """Lets some modules be imported as ever, and then changes them."""

    def __init__(self, changes):
        self.changes = changes

    def find_spec(self, name, path=None, target=None):
        change = self.changes.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def and_change(module):
            execute(module)
            change(module)

        spec.loader.exec_module = and_change
        return spec


if FAULTS:
    changes = {
        "megatrain.resilience.heartbeat": watch_the_place,
        "megatrain.kernels.cross_entropy": spoil_the_loss,
    }
    sys.meta_path.insert(0, Finder(changes))
