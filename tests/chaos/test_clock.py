"""The wall clock is changed while a job runs. The oracle is a run whose clock was left alone."""

from __future__ import annotations

from datetime import datetime

from support.commands import TWO_NATIVE, events, final_files, metrics, same
from support.faults import fault, preloaded, run_with


def when(record):
    return datetime.fromisoformat(record["time"].replace("Z", "+00:00")).timestamp()


def test_a_wall_clock_that_jumps_by_an_hour_changes_nothing(workplace, undisturbed_native, tmp_path):
    """The clock of every process jumps an hour ahead, then two back, file times included; then a rank dies.

    No process hangs or loses the run folder, records stay in order, and the restart takes the checkpoint of the latest
    step, not the one with the latest time.
    """
    clock = tmp_path / "clock"
    clock.write_text("+0000")
    environ = {**preloaded("clock.c", tmp_path), "CLOCK_SHIFT": str(clock)}
    saved = workplace / "runs" / "clock" / "checkpoints"
    set_to = f"printf %s {{}} | dd of={clock} conv=notrunc status=none"  # one write: no process reads half of it
    age = f"LD_PRELOAD= touch -d '1 hour' {saved}/step_*"
    faults = [
        fault(0, 8, "forward", "run", by=set_to.format("+3600")),
        fault(0, 22, "backward", "run", by=f"{age}; {set_to.format('-3600')}"),
        fault(1, 28, "backward", "SIGKILL"),
    ]
    words = [*TWO_NATIVE, "run.name=clock", "resilience.hang_timeout_s=30"]
    done = run_with(workplace, faults, *words, environ=environ)
    assert done.returncode == 0, done.stderr
    records = metrics(workplace, "clock")
    same(records, undisturbed_native)
    assert 3500 < when(records[9]) - when(records[5]) < 3700 and -7300 < when(records[24]) - when(records[20]) < -7100
    assert final_files(workplace, "clock") == final_files(workplace, "undisturbed-native")
    (failure,) = events(workplace, "clock", "failure")
    assert failure["how"] == "SIGKILL" and not events(workplace, "clock", "hang")
    assert [event["step"] for event in events(workplace, "clock", "resume")] == [25]
    assert [event["step"] for event in events(workplace, "clock", "save")] == [5, 10, 15, 20, 25, 30, 35, 40]
