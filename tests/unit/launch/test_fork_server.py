"""Ranks that are forked, and what is left where none came."""

from __future__ import annotations

import sys
import time

import pytest

from megatrain.launch import agent as local
from megatrain.launch.nodes import Alone
from megatrain.resilience.owner import Ownership
from megatrain.resilience.watchdog import Limits


@pytest.mark.skipif(not local.LINUX, reason="forks ranks on Linux only")
def test_a_nursery_that_is_given_up_makes_no_rank_later(tmp_path):
    """The rank is started in another way by then: there must not be two of it."""
    (tmp_path / "slow_import.py").write_text("import time; time.sleep(1)")
    recovery = local.Recovery(tmp_path, Ownership.take(tmp_path), 2, Limits(60, 60), modules=["slow_import"])
    agent = local._Agent([sys.executable, "-m", "megatrain", "--version"], 1, tmp_path, recovery, Alone())
    try:
        agent.pending.extend([2, 2])  # Ctrl-C twice: nobody waits for imports
        path = ":".join([str(tmp_path), *sys.path])
        assert agent._fork({"RANK": "1", "LOCAL_RANK": "0", "PYTHONPATH": path}) is None
        time.sleep(2)
        assert not (tmp_path / "rank_00001.log").exists(), "it was forked all the same"
    finally:
        agent.close()
