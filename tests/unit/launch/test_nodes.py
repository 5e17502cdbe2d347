"""Agents of two nodes, run as two processes: their workers start, restart and end together, whatever fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.workers import SAVE_ON_TERM, exit_with, is_running, wait_for, worker

AGENT = """
import json, pathlib, signal, sys
from megatrain.errors import EnvironmentFault
from megatrain.launch import agent, nodes
from megatrain.launch.recovery import Recovery
from megatrain.resilience.owner import FOLDER, Ownership
from megatrain.resilience.watchdog import Limits
for number in agent.FORWARDED_SIGNALS: signal.signal(number, signal.SIG_DFL)
agent.GRACE_PERIOD_S, agent.KILL_S = 0.2, 1.0
agent.HOST = f"node{sys.argv[1]}"
node, folder, hang_s = int(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[5])
(folder / FOLDER).mkdir(exist_ok=True)
team = nodes.connect(sys.argv[3], node, 2, "127.0.0.1", 10)
recovery = Recovery(folder, Ownership(folder / FOLDER, 1), 2, 2, Limits(hang_s, hang_s))
try:
    sys.exit(agent.launch(json.loads(sys.argv[4]), 2, folder / "logs", recovery, team))
except EnvironmentFault as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start_nodes(command, folder, hang_s=60.0):
    """Start the agents of two nodes with two ranks each."""
    key = f"{os.getpid()}.{time.monotonic_ns()}"
    words = [str(folder), key, json.dumps(command), str(hang_s)]
    return [
        subprocess.Popen([sys.executable, "-c", AGENT, str(node), *words], stderr=subprocess.PIPE, text=True)
        for node in range(2)
    ]


def ends(agents, seconds=30):
    """Return the agents' exit codes and output."""
    said = [agent.communicate(timeout=seconds)[1] for agent in agents]
    return [agent.returncode for agent in agents], said


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (("0", "0", "0", "0"), 0),
        (("75", "75", "75", "75"), 75),
        (("sleep(30)", "sleep(30)", "sleep(30)", "4"), 4),
        (("sleep(30)", "8", "sleep(30)", "sleep(0.15) or 3"), 3),
        (("3", "3", "3", "3"), 3),
    ],
)
def test_all_nodes_end_with_one_code(codes, expected, tmp_path):
    found, said = ends(start_nodes(exit_with(*codes), tmp_path))
    assert found == [expected] * 2, said
    assert not said[1], "only node 0 prints the message"
    own_words = expected in (0, 75) or codes[0] == str(expected)
    assert bool(said[0]) != own_words, said


def test_a_killed_rank_restarts_the_ranks_of_all_nodes(tmp_path):
    code = """
        import json, os, pathlib, signal, sys, time
        rank, again = os.environ["RANK"], os.environ["MEGATRAIN_RESTARTS"]
        seen = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")}
        (pathlib.Path(sys.argv[1]) / f"{rank}.{again}").write_text(json.dumps(seen))
        if rank == "3" and again == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if again == "0":
            time.sleep(60)
        end(0)
    """
    found, said = ends(start_nodes(worker(code, tmp_path), tmp_path))
    assert found == [0, 0], said
    assert "rank 3 on node1 was killed by SIGKILL" in said[0] and "restart 1 of 2" in said[0]
    for again in (0, 1):
        seen = [json.loads((tmp_path / f"{rank}.{again}").read_text()) for rank in range(4)]
        assert [one["LOCAL_RANK"] for one in seen] == ["0", "1", "0", "1"]
        assert {(one["WORLD_SIZE"], one["MASTER_ADDR"]) for one in seen} == {("4", "127.0.0.1")}
        assert len({one["MASTER_PORT"] for one in seen}) == 1


@pytest.mark.parametrize("code", [0, 75])
def test_a_rank_that_ends_without_a_word_is_a_failure_whatever_its_exit_code(code, tmp_path):
    found, said = ends(start_nodes(exit_with("sleep(9)", "sleep(9)", f"os._exit({code})", "sleep(9)"), tmp_path))
    assert found == [6, 6], said
    assert f"rank 2 on node1 ended with exit code {code} " in said[0] and "without finishing, saving" in said[0]


def test_all_nodes_stop_restarting_at_the_same_time(tmp_path):
    found, said = ends(start_nodes(exit_with("sleep(9)", "sleep(9)", "die('SIGSEGV')", "sleep(9)"), tmp_path))
    assert found == [6, 6], said  # the same failure at the same place three times
    assert "the same 3 times in a row" in said[0]


@pytest.mark.parametrize("gone", [0, 1])
def test_an_agent_that_is_killed_ends_the_others_with_8_and_their_workers(gone, tmp_path):
    agents = start_nodes(worker(SAVE_ON_TERM, tmp_path, 0), tmp_path)
    pid_files = [tmp_path / f"pid_{rank}" for rank in range(4)]
    wait_for(*pid_files)
    agents[gone].send_signal(signal.SIGKILL)
    started = time.monotonic()
    found, said = ends([agents[1 - gone]])
    assert found == [8] and f"node {gone}, " in said[0] and "is gone" in said[0]
    assert time.monotonic() - started < 5
    time.sleep(0.2)
    assert not any(is_running(int(path.read_text())) for path in pid_files)
    agents[gone].communicate()


def test_a_signal_to_every_agent_saves_everywhere(tmp_path):
    agents = start_nodes(worker(SAVE_ON_TERM, tmp_path, 1.5), tmp_path)
    wait_for(*[tmp_path / f"pid_{rank}" for rank in range(4)])
    for agent in agents:
        agent.send_signal(signal.SIGUSR1)
    found, said = ends(agents)
    assert found == [75, 75], said
    assert all((tmp_path / f"saved_{rank}").exists() for rank in range(4))


def test_a_job_hangs_only_when_no_rank_of_any_node_makes_progress(tmp_path):
    """Node 0's ranks make no progress at all; node 1's do at first."""
    code = """
        import os, time
        from megatrain.distributed.rank_environment import RankEnvironment
        from megatrain.resilience.heartbeat import Heartbeat
        import faulthandler, pathlib, sys
        from megatrain.resilience.watchdog import answer_with_stacks
        from megatrain.resilience.watchdog import stack_file
        if os.environ["MEGATRAIN_RESTARTS"] == "1":
            end(0)
        rank = int(os.environ["RANK"])
        file = answer_with_stacks(stack_file(pathlib.Path(sys.argv[1]), rank))
        beat = Heartbeat.from_environ(int(os.environ["LOCAL_RANK"]))
        begun = time.monotonic()
        while time.monotonic() - begun < (6 if rank > 1 else 0):
            beat.beat()
            time.sleep(0.05)
        (pathlib.Path(sys.argv[1]) / f"stopped_{rank}").touch()
        time.sleep(60)
    """
    (tmp_path / "logs").mkdir()
    agents = start_nodes([sys.executable, *worker(code, tmp_path)[3:]], tmp_path, hang_s=3.0)
    found, said = ends(agents, seconds=60)
    assert found == [0, 0], said
    assert (tmp_path / "stopped_3").exists(), "the watchdog waited for the last that moved"
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    hangs = [(line["rank"], line["host"]) for line in lines if line["kind"] == "hang"]
    assert hangs == [(0, "node0"), (1, "node0"), (2, "node1"), (3, "node1")], lines
