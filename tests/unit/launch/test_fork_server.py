"""Forked ranks, and a fork server that is abandoned."""

from __future__ import annotations

import sys
import time

import pytest

from megatrain.launch.agent import Agent
from megatrain.launch.nodes import SingleNode
from megatrain.launch.rank_process import LINUX
from megatrain.launch.recovery import Recovery
from megatrain.resilience.owner import Ownership
from megatrain.resilience.watchdog import Limits


@pytest.mark.skipif(not LINUX, reason="forks ranks on Linux only")
def test_an_abandoned_fork_server_forks_no_rank_later(tmp_path):
    """By then the rank was started without the fork server, and it must not run twice."""
    (tmp_path / "slow_import.py").write_text("import time; time.sleep(1)")
    recovery = Recovery(tmp_path, Ownership.take(tmp_path), 2, 2, Limits(60, 60), modules=["slow_import"])
    agent = Agent([sys.executable, "-m", "megatrain", "--version"], 1, tmp_path, recovery, SingleNode())
    try:
        agent.pending_signals.extend([2, 2])  # Ctrl-C twice: the agent does not wait for the imports
        path = ":".join([str(tmp_path), *sys.path])
        assert agent.fork_rank({"RANK": "1", "LOCAL_RANK": "0", "PYTHONPATH": path}) is None
        time.sleep(2)
        assert not (tmp_path / "rank_00001.log").exists(), "the rank was forked anyway"
    finally:
        agent.close()
