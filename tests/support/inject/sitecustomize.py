"""Makes ranks of a job under test fail, for real, at an exact place. Every Python process with this folder on its path
reads it.

`FAULTS` in the environment is a JSON list; each fault has `rank`, `step`, `phase` (of `resilience.heartbeat.PHASES`),
how many `times` it strikes (1 unless given; counted over all starts by files in `FAULTS_DONE`) and what to `do`: a
signal's name; `sleep`; `wait`, until the test makes the file `by` in `FAULTS_DONE`; `slow`, from then on, with `by` 0.3
for 30 %; `run` with a shell command `by`; or `add` or `multiply` with a number `by`: to the loss of a micro-batch, as
the model computes it.
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
SLOW_DOWN = """
import os, signal, sys, time
pid, share = int(sys.argv[1]), float(sys.argv[2])
ran = stopped = 0.0
while True:
    began = time.monotonic()
    time.sleep(0.005)
    try:
        os.kill(pid, signal.SIGSTOP)
        ran += time.monotonic() - began
        began = time.monotonic()
        time.sleep(max(0.0, share * ran - stopped))
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        break
    stopped += time.monotonic() - began
"""
"""A process that stops and continues another one, so that this needs `share` more time for whatever it does."""

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
    if fault["do"] == "slow":  # it dies with the rank's session
        command = [sys.executable, "-E", "-S", "-c", SLOW_DOWN, str(os.getpid()), str(fault["by"])]
        subprocess.Popen(command, stdin=subprocess.DEVNULL)
        return
    if fault["do"] == "wait":
        open(f"{os.environ['FAULTS_DONE']}/{fault['by']}.waits", "w").close()
        deadline = time.monotonic() + 300
        while not os.path.exists(f"{os.environ['FAULTS_DONE']}/{fault['by']}"):
            if time.monotonic() > deadline:
                sys.exit(f"nobody made {fault['by']}")
            time.sleep(0.02)
        return
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
    true = module.GPT.cross_entropy_sum

    def spoiled(*given):
        loss = true(*given)
        for fault in due(to_the_loss=True):
            loss = loss + float(fault["by"]) if fault["do"] == "add" else loss * float(fault["by"])
        return loss

    module.GPT.cross_entropy_sum = spoiled


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
        "megatrain.model.gpt": spoil_the_loss,
    }
    sys.meta_path.insert(0, Finder(changes))
