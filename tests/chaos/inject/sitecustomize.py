"""Makes ranks of a job under test fail, for real, at an exact place. Every Python process with this folder on its path reads it.

`FAULTS` in the environment is a JSON list; each fault has `rank`, `step`, `phase` (of `resilience.heartbeat.PHASES`), what to
`do` (a signal's name, or `sleep`) and how many `times` (1 unless given), counted over all starts by files in `FAULTS_DONE`.
"""

import importlib.util
import json
import os
import signal
import sys
import time

WATCHED = "megatrain.resilience.heartbeat"
FAULTS = json.loads(os.environ.get("FAULTS", "[]"))


def first_time(number, times):
    """Whether fault `number` has struck less often than it may; counts this time."""
    for time_ in range(times):
        try:
            os.close(os.open(f"{os.environ['FAULTS_DONE']}/{number}.{time_}", os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            continue
    return False


def strike(fault):
    if fault["do"] == "sleep":
        time.sleep(3600)
    os.kill(os.getpid(), getattr(signal, fault["do"]))


class Finder:
    """Lets the heartbeat be imported as ever, and puts itself before each of its marks."""

    def find_spec(self, name, path=None, target=None):
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def with_faults(module):
            execute(module)
            enter = module.Heartbeat.enter

            def enter_and_fail(heartbeat, phase, step=None):
                enter(heartbeat, phase, step)
                for number, fault in enumerate(FAULTS):
                    here = (int(os.environ.get("RANK", -1)), heartbeat.step, phase)
                    struck = here == (fault["rank"], fault["step"], fault["phase"])
                    if struck and first_time(number, fault.get("times", 1)):
                        strike(fault)

            module.Heartbeat.enter = enter_and_fail

        spec.loader.exec_module = with_faults
        return spec


if FAULTS:
    sys.meta_path.insert(0, Finder())
