"""Make ranks of a job under test really fail at an exact step and phase.

Every Python process with this folder on its path imports this module.

`FAULTS` in the environment is a JSON list; each fault has `rank`, `step`, `phase` (of `resilience.heartbeat.PHASES`),
how many `times` it strikes (default 1; counted over all starts by files in `FAULTS_DONE`) and what to `do`: the name of
a signal to send; `sleep`; `wait` until the test creates the file `by` in `FAULTS_DONE`; `slow` down from then on, with
`by` 0.3 for 30 % more time; `run` the shell command `by`; `exit` with the status `by`, as C code may; `raise` the
exception that `by` is an expression of; or `add` the number `by` to a micro-batch's loss, or `multiply` the loss by it.
A fault with `where` strikes in the first call of that function, `module:Class.method`, at that step or a later one, in
any thread and phase.
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
"""A program that stops and continues another process so often that the other takes `share` more time."""

place = (None, None, None)
"""The rank, step and phase that this process is in."""


def first_time(number, times):
    """Return whether fault `number` may strike once more; if so, count this strike."""
    for time_ in range(times):
        try:
            os.close(os.open(f"{os.environ['FAULTS_DONE']}/{number}.{time_}", os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            continue
    return False


def reached(fault):
    """Return whether this process is where a fault strikes; with `where`, at that step or a later one."""
    rank, step, _ = place
    if fault.get("where"):
        return rank == fault["rank"] and step >= fault["step"]
    return place == (fault["rank"], fault["step"], fault["phase"])


def due(to_the_loss, where=None):
    """Return the faults that strike now, and count them."""
    return [
        fault
        for number, fault in enumerate(FAULTS)
        if (fault["do"] in TO_THE_LOSS) == to_the_loss
        and fault.get("where") == where
        and reached(fault)
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
                sys.exit(f"{fault['by']} was never created")
            time.sleep(0.02)
        return
    if fault["do"] == "raise":
        import errno  # noqa: F401 (for the expression)

        import torch  # noqa: F401 (for the expression)

        raise eval(fault["by"])
    if fault["do"] == "exit":
        os._exit(fault["by"])
    if fault["do"] == "sleep":
        time.sleep(3600)
    if fault["do"] == "run":
        subprocess.run(fault["by"], shell=True, check=True)
        return
    os.kill(os.getpid(), getattr(signal, fault["do"]))


def watch_the_place(module):
    """Make faults strike where the heartbeat enters a phase."""
    enter = module.Heartbeat.enter

    def enter_and_fail(heartbeat, phase, step=None):
        global place
        enter(heartbeat, phase, step)
        place = (int(os.environ.get("RANK", -1)), heartbeat.step, phase)
        for fault in due(to_the_loss=False):
            strike(fault)

    module.Heartbeat.enter = enter_and_fail


def spoil_the_loss(module):
    """Change the loss that the model computes; multiplying it changes the gradient too."""
    true = module.GPT.cross_entropy_sum

    def spoiled(*given):
        loss = true(*given)
        for fault in due(to_the_loss=True):
            loss = loss + float(fault["by"]) if fault["do"] == "add" else loss * float(fault["by"])
        return loss

    module.GPT.cross_entropy_sum = spoiled


def watch_calls(where):
    """Return a change of a module after which the faults of `where` strike in its function."""
    module_name, _, path = where.partition(":")

    def change(module):
        *owners, name = path.split(".")
        owner = module
        for part in owners:
            owner = getattr(owner, part)
        true = getattr(owner, name)

        def call_and_fail(*given, **named):
            for fault in due(to_the_loss=False, where=where):
                strike(fault)
            return true(*given, **named)

        setattr(owner, name, call_and_fail)

    return module_name, change


class Finder:
    """Imports some modules as usual, then changes them."""

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
    changes |= dict(watch_calls(where) for where in {fault["where"] for fault in FAULTS if fault.get("where")})
    sys.meta_path.insert(0, Finder(changes))
