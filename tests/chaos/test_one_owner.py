"""Two jobs on one run folder: at once, and after the first was killed."""

from __future__ import annotations

import time

from support.commands import TRAIN, events, megatrain, metrics, same, start

WORDS = [*TRAIN, "engine=native", "train.steps=2000", "train.eval_every=0", "train.eval_steps=1", "checkpoint.every=50"]


def test_a_second_job_is_refused_and_the_owner_continues(workplace):
    """The second job exits with 7, names the owner's process and touches nothing of the first job. Once the owner is
    dead, the next job takes over."""
    first = start(workplace, *WORDS, "run.name=owned")
    deadline = time.monotonic() + 120
    while len(metrics(workplace, "owned")) < 100:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    second = megatrain(workplace, *WORDS, "run.name=owned")
    assert second.returncode == 7, second.stderr
    assert f"process {first.pid}, since 20" in second.stderr and "another run.name" in second.stderr
    seen = len(metrics(workplace, "owned"))
    first.kill()
    first.communicate()
    third = megatrain(workplace, *WORDS, "run.name=owned", "train.steps=" + str(seen + 60))
    assert third.returncode == 0, third.stderr
    (resumed,) = events(workplace, "owned", "resume")
    assert resumed["step"] >= seen - 100, "the refused job cost no step"
    whole = megatrain(workplace, *WORDS, "run.name=alone", "train.steps=" + str(seen + 60))
    assert whole.returncode == 0, whole.stderr
    same(metrics(workplace, "owned")[:50], metrics(workplace, "alone")[:50], ("step", "batch_hash", "tokens"))
    assert len(metrics(workplace, "owned")) == seen + 60
