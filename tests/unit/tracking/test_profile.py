"""How a profile follows the heartbeat, and the arithmetic of its table; real jobs are in tests/e2e/test_profile.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatrain.checkpoint.resume import may_change
from megatrain.distributed.world import World
from megatrain.errors import EnvironmentFault
from megatrain.tracking import profile
from megatrain.tracking.profile import device_times, phase_rows, profiled_steps


class Clock:
    """A clock that advances only when a test moves it."""

    now_ns = 0

    def perf_counter_ns(self):
        return self.now_ns


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(profile, "time", clock)
    return clock


def step(world, number, clock, milliseconds=4):
    for phase in ("data", "exchange", "forward", "backward", "update"):
        world.heartbeat.enter(phase, number)
        if phase == "backward":
            world.heartbeat.waited(1_000_000)
            clock.now_ns += milliseconds * 1_000_000


def test_the_steps_of_the_window_are_traced(tmp_path, clock):
    """The table covers the 6th to 8th step of a start, without evaluations and the phases of other steps."""
    world, shown = World(0, 1, 0, torch.device("cpu"), None), []
    with profiled_steps(tmp_path / "profile", world, shown.append):
        for number in range(101, 112):
            step(world, number, clock, milliseconds=500 if number < 106 or number > 108 else 4)
            world.heartbeat.enter("evaluate", number)
        world.heartbeat.enter("end", 111)
    (table,) = shown
    assert world.heartbeat.listener is None
    assert "steps 106 to 108" in table and (tmp_path / "profile" / "table.txt").read_text() == table + "\n"
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line}
    assert rows["backward"][1:] == ["4.000", "100.0%", "1.000"]
    assert "evaluate" in rows and not rows["evaluate"][2].endswith("%")
    assert (tmp_path / "profile" / "trace_rank_00000.json.gz").exists()


def test_a_run_that_ends_inside_the_window_is_written(tmp_path, clock):
    """The table holds the steps traced so far; a run that ends before the window says that it traced nothing."""
    world, shown = World(0, 1, 0, torch.device("cpu"), None), []
    for last in (7, 3):
        with profiled_steps(tmp_path / str(last), world, shown.append):
            for number in range(1, last + 1):
                step(world, number, clock)
            world.heartbeat.enter("end", last)
    assert "steps 6 to 7" in shown[0] and "traced nothing" in shown[1] and not (tmp_path / "3").exists()


def test_rows_add_up():
    """Shares are of the step; phases between steps have none; a GPU adds columns for kernels."""
    rows = phase_rows({"data": 0.1, "forward": 0.3, "save": 9.0}, {"forward": 0.2}, {}, {}, 2, on_gpu=False)
    assert [row.split() for row in rows[1:5]] == [
        ["data", "50.000", "25.0%", "0.000"],
        ["forward", "150.000", "75.0%", "100.000"],
        ["step", "200.000", "100.0%", "100.000"],
        ["save", "4500.000", "0.000"],
    ]
    assert "pipeline" in rows[5]
    rows = phase_rows({"forward": 0.2, "backward": 0.2}, {}, {"backward": 0.3}, {"backward": 0.1}, 2, on_gpu=True)
    assert rows[2].split() == ["backward", "100.000", "50.0%", "150.000", "50.000"]


def test_kernels_belong_to_the_phase_that_launched_them():
    """Kernels are matched by launch time, on any thread; NCCL kernels count as communication."""

    def event(name, start, end, *kernels):
        return SimpleNamespace(
            name=name,
            device_type=torch.autograd.DeviceType.CPU,
            time_range=SimpleNamespace(start=start, end=end),
            kernels=[SimpleNamespace(name=kernel, duration=microseconds) for kernel, microseconds in kernels],
        )

    events = [
        event("megatrain::step 6", 0, 100),
        event("megatrain::forward", 0, 50),
        event("megatrain::backward", 50, 100),
        event("aten::mm", 10, 20, ("gemm", 7)),
        event("aten::mm", 60, 70, ("gemm", 9), ("ncclDevKernel_AllReduce", 5)),
        event("aten::mm", 150, 160, ("gemm", 1000)),
    ]
    kernels, communication = device_times(events)
    assert kernels == pytest.approx({"forward": 7e-6, "backward": 14e-6})
    assert communication == pytest.approx({"backward": 5e-6})


def test_a_resume_may_profile():
    """Profiling does not change the run."""
    assert may_change("profile") and not may_change("profiles")


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_trained(tmp_path):
    """The test holds for root too, whom permissions do not stop."""
    (tmp_path / "profile").write_text("in the way")
    world = World(0, 1, 0, torch.device("cpu"), None)
    with pytest.raises(EnvironmentFault, match=r"profile=true cannot write to .*profile: File exists; remove"):
        with profiled_steps(tmp_path / "profile", world, print):
            raise AssertionError("it went on")
    assert (tmp_path / "profile").read_text() == "in the way"
