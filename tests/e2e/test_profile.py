"""`profile=true`: the trace, the table, and results that do not change by a bit."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from support.commands import TRAIN, megatrain, metrics, same

PHASES = ("data", "exchange", "forward", "backward", "update")


def spans(folder, name, rank):
    """Return the complete events of a rank's trace."""
    trace = json.loads(
        gzip.decompress((folder / "runs" / name / "profile" / f"trace_rank_{rank:05d}.json.gz").read_bytes())
    )
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def check(folder, name, num_ranks, printed):
    """Check that every trace has the phases and a matrix product, and that the table adds up to the steps' time."""
    for rank in range(num_ranks):
        found = spans(folder, name, rank)
        names = [event["name"] for event in found]
        for phase in PHASES:
            assert names.count(f"megatrain::{phase}") >= 3, (rank, phase)
        assert {n for n in names if n.startswith("megatrain::step ")} == {f"megatrain::step {n}" for n in (6, 7, 8)}
        assert {"aten::mm", "aten::addmm"} & set(names)
    table = (folder / "runs" / name / "profile" / "table.txt").read_text()
    assert table in printed
    milliseconds = {
        row[0]: float(row[1])
        for line in table.splitlines()
        if (row := re.split(r"  +", line)) and row[0] in (*PHASES, "step")
    }
    assert set(milliseconds) == {*PHASES, "step"}
    assert sum(milliseconds[phase] for phase in PHASES) == pytest.approx(milliseconds["step"], abs=0.01)
    traced = [record["step_time_s"] * 1e3 for record in metrics(folder, name) if record["step"] in (6, 7, 8)]
    # the table's time also covers what follows a step (the record, the trackers) but not the start of tracing, which
    # the first step's own time covers
    assert 0.75 * min(traced) <= milliseconds["step"] <= 1.5 * sum(traced) / 3 + 20
    assert "aten::mm" in table and "memory, MiB" in table


def test_profiling_two_deepspeed_ranks_changes_no_record(workplace, undisturbed):
    """With DeepSpeed and ZeRO-3, two ranks write a trace each and one table; records equal those without a profile."""
    done = megatrain(workplace, *TRAIN, "run.name=profiled", "launch.nproc_per_node=2", "profile=true")
    assert done.returncode == 0, done.stderr
    same(metrics(workplace, "profiled"), undisturbed)
    check(workplace, "profiled", 2, done.stdout)


def test_profiling_changes_no_bit_of_the_native_engine(workplace):
    """Records equal those without a profile; a run without one has no profile folder; a resume may add a profile."""
    words = [*TRAIN, "engine=native", "train.steps=10", "train.eval_every=0"]
    for name, asked in (("plain", "false"), ("traced", "true")):
        done = megatrain(workplace, *words, f"run.name={name}", f"profile={asked}")
        assert done.returncode == 0, done.stderr
    same(metrics(workplace, "traced"), metrics(workplace, "plain"))
    check(workplace, "traced", 1, done.stdout)
    assert not (workplace / "runs" / "plain" / "profile").exists()
    done = megatrain(workplace, *words, "run.name=plain", "profile=true", "train.steps=13")
    assert done.returncode == 0, done.stderr
    assert "profile=true traced nothing" in done.stdout and len(metrics(workplace, "plain")) == 13
