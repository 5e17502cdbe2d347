"""The local agent: environment, exit codes, signals and the death of workers, shown with tiny Python programs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.workers import SAVE_ON_TERM, exit_with, is_running, wait_for, worker

from megatrain.errors import EnvironmentFault
from megatrain.launch import agent as agent_module
from megatrain.launch import notices, rank_process
from megatrain.launch.nodes import SingleNode


def start_agent(command: list[str], num_workers: int, folder: Path) -> subprocess.Popen:
    """Start an agent in a new process with default signal handlers (a shell's `&` ignores some signals)."""
    program = (
        "import sys, json, pathlib, signal; from megatrain.launch import agent as agent_module; "
        "[signal.signal(number, signal.SIG_DFL) for number in agent_module.FORWARDED_SIGNALS]; "
        "agent_module.GRACE_PERIOD_S, agent_module.KILL_S, agent_module.STOPPING_S = 0.2, 1.0, 0.6; "
        "sys.exit(agent_module.launch(json.loads(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])))"
    )
    arguments = [json.dumps(command), str(num_workers), str(folder / "logs")]
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True)


def test_each_worker_gets_its_rank_and_the_same_rendezvous_address(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    code = """
        import json, os, sys
        open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").write(json.dumps(dict(os.environ)))
    """
    assert agent_module.launch(worker(code, tmp_path), 3, tmp_path / "logs") == 0
    seen = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [environ["LOCAL_RANK"] for environ in seen] == ["0", "1", "2"]
    assert {environ["WORLD_SIZE"] for environ in seen} == {environ["LOCAL_WORLD_SIZE"] for environ in seen} == {"3"}
    assert len({environ["MASTER_PORT"] for environ in seen}) == 1
    assert {environ["MASTER_ADDR"] for environ in seen} == {"127.0.0.1"}
    assert {environ["MEGATRAIN_WORKER"] for environ in seen} == {"1"}
    assert {environ["OMP_NUM_THREADS"] for environ in seen} == {str(max(1, len(os.sched_getaffinity(0)) // 3))}
    assert {environ["GLOO_SOCKET_IFNAME"] for environ in seen} == {"lo"}


def test_environment_variables_that_the_user_set_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    code = (
        "import os, sys; sys.exit((os.environ['OMP_NUM_THREADS'], os.environ['GLOO_SOCKET_IFNAME']) != ('7', 'eth9'))"
    )
    assert agent_module.launch(worker(code), 1, tmp_path) == 0


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (("0", "0"), 0),
        (("75", "75"), 75),
        (("75", "0"), 75),
        (("3", "3"), 3),
        (("sleep(30)", "4"), 4),
        (("sleep(0.6) or 1", "8"), 8),
        (("8", "sleep(0.3) or 3"), 3),
        (("8", "3"), 3),
        (("8", "sleep(0.3) or die('SIGKILL')"), 1),
        (("8", "sleep(0.3) or die('SIGABRT')"), 8),
        (("die('SIGKILL')", "sleep(30)"), 1),
        (("0", "sleep(0.3) or die('SIGSEGV')"), 1),
    ],
)
def test_the_jobs_exit_code_is_that_of_the_first_worker_that_failed(tmp_path, codes, expected, monkeypatch):
    monkeypatch.setattr(agent_module, "GRACE_PERIOD_S", 1.0)
    started = time.monotonic()
    assert agent_module.launch(exit_with(*codes), 2, tmp_path) == expected
    assert time.monotonic() - started < 10


def test_a_rank_killed_by_a_signal_is_named_with_its_signal_and_log(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(agent_module, "GRACE_PERIOD_S", 0.2)
    code = "print('about to go', flush=True) or die('SIGKILL')"
    assert agent_module.launch(exit_with("sleep(30)", code), 2, tmp_path) == 1
    shown = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL" in shown
    assert str(tmp_path / "rank_00001.log") in shown and "about to go" in shown


def test_a_mistake_reported_by_every_rank_is_shown_once(tmp_path, capfd):
    code = "print('megatrain: error: no such thing', file=sys.stderr) or 2"
    assert agent_module.launch(exit_with(f"sleep(0.3) or {code}", code, code), 3, tmp_path) == 2
    assert capfd.readouterr().err.count("no such thing") == 1
    assert "no such thing" in (tmp_path / "rank_00001.log").read_text()


def test_a_failure_of_another_rank_is_shown_even_if_rank_0_failed_differently(tmp_path, capfd):
    code = "print('the true cause', file=sys.stderr) or 3"
    assert agent_module.launch(exit_with("sleep(0.3) or 8", code), 2, tmp_path) == 3
    assert "the true cause" in capfd.readouterr().err


def test_a_worker_that_ignores_termination_is_killed_within_ten_seconds(tmp_path):
    code = """
        import os, signal, sys, time
        if os.environ["RANK"] == "1":
            time.sleep(0.3)
            sys.exit(3)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    """
    started = time.monotonic()
    assert agent_module.launch(worker(code), 2, tmp_path) == 3
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("sent", "received"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGINT, "SIGTERM"), (signal.SIGHUP, "SIGTERM")],
)
def test_a_signal_reaches_every_worker_and_the_agent_waits_for_their_save(tmp_path, sent, received):
    agent = start_agent(worker(SAVE_ON_TERM, tmp_path, 1.0), 2, tmp_path)
    wait_for(tmp_path / "pid_0", tmp_path / "pid_1")
    agent.send_signal(sent)
    assert agent.wait(timeout=20) == 75
    for rank in (0, 1):
        assert (tmp_path / f"got_{rank}").read_text() == received
        assert (tmp_path / f"sent_{rank}").read_text() == str(int(sent)), "the rank is told what was sent to the agent"
        assert (tmp_path / f"saved_{rank}").exists()


def test_a_slow_save_after_a_signal_is_never_cut_short(tmp_path):
    """The save takes longer than the grace period of a failed job (1 s here), and another rank has already ended."""
    code = """
        import os, signal, sys, time
        rank = os.environ["RANK"]
        def save(number, frame):
            time.sleep(2.5 if rank == "0" else 0)
            open(f"{sys.argv[1]}/saved_{rank}", "w").write("x")
            sys.exit(75)
        signal.signal(signal.SIGTERM, save)
        open(f"{sys.argv[1]}/pid_{rank}", "w").write("x")
        time.sleep(60)
        time.sleep(60)
    """
    agent = start_agent(worker(code, tmp_path), 2, tmp_path)
    wait_for(tmp_path / "pid_0", tmp_path / "pid_1")
    agent.terminate()
    assert agent.wait(timeout=30) == 75
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


@pytest.mark.parametrize(("number", "how"), [(signal.SIGTERM, "Ctrl-C twice"), (signal.SIGINT, "another Ctrl-C")])
def test_a_stop_that_takes_long_says_what_it_waits_for(tmp_path, number, how):
    agent = start_agent(worker(SAVE_ON_TERM, tmp_path, 1.5), 2, tmp_path)
    wait_for(tmp_path / "pid_0", tmp_path / "pid_1")
    agent.send_signal(number)
    assert agent.wait(timeout=20) == 75
    told = [line for line in agent.stderr.read().splitlines() if "asked to stop" in line]
    assert told and "rank 0 is in step 0 (start)" in told[0] and f"; {how} ends" in told[0]
    assert len(told) <= 3, "not with every poll"


def test_a_second_ctrl_c_ends_a_save_at_once(tmp_path):
    agent = start_agent(worker(SAVE_ON_TERM, tmp_path, 60), 2, tmp_path)
    wait_for(tmp_path / "pid_0", tmp_path / "pid_1")
    agent.send_signal(signal.SIGINT)
    wait_for(tmp_path / "got_0", tmp_path / "got_1")
    agent.send_signal(signal.SIGINT)
    assert agent.wait(timeout=5) == 130
    assert not (tmp_path / "saved_0").exists()
    assert not is_running(int((tmp_path / "pid_0").read_text()))


def test_a_second_ctrl_c_says_what_is_saved(tmp_path):
    """The workers have saved, and wait for something else, such as MLflow."""
    (tmp_path / "checkpoints/step_00000007").mkdir(parents=True)
    agent = start_agent(worker(SAVE_ON_TERM, tmp_path, 60), 2, tmp_path)
    wait_for(tmp_path / "pid_0", tmp_path / "pid_1")
    agent.send_signal(signal.SIGINT)
    wait_for(tmp_path / "got_0", tmp_path / "got_1")
    agent.send_signal(signal.SIGINT)
    assert agent.wait(timeout=20) == 130
    assert "stopped (second Ctrl-C); the checkpoint of step 7 is complete" in agent.stderr.read()
    assert "stopped without saving (second Ctrl-C); the last step was 8, " in notices.cut_short(tmp_path, 8)
    assert notices.cut_short(tmp_path / "new", 0) == "stopped without saving (second Ctrl-C)"


def test_ctrl_c_after_all_workers_have_saved_and_ended_changes_nothing(tmp_path):
    agent = agent_module.Agent(worker(SAVE_ON_TERM, tmp_path, 0), 1, tmp_path, None, SingleNode())
    try:
        agent._start_workers()
        wait_for(tmp_path / "pid_0")
        agent.on_signal(signal.SIGINT, None)
        agent._forward_signals()
        agent.workers[0].process.wait()
        agent.on_signal(signal.SIGINT, None)
        agent.on_signal(signal.SIGINT, None)
        assert agent._wait().code == 75
    finally:
        agent.close()


def test_a_signal_before_the_workers_can_save_still_asks_for_a_restart(tmp_path):
    code = "import os, sys, time; open(f'{sys.argv[1]}/pid_' + os.environ['RANK'], 'w').write('x'); time.sleep(60)"
    agent = start_agent(worker(code, tmp_path), 2, tmp_path)
    wait_for(tmp_path / "pid_0", tmp_path / "pid_1")
    agent.terminate()
    assert agent.wait(timeout=15) == 75
    assert "stopped by SIGTERM before training began" in agent.stderr.read()


def test_ctrl_c_before_the_workers_can_save_is_called_so(tmp_path):
    """The ranks get SIGTERM for it."""
    code = "import os, sys, time; open(f'{sys.argv[1]}/pid_' + os.environ['RANK'], 'w').write('x'); time.sleep(60)"
    agent = start_agent(worker(code, tmp_path), 1, tmp_path)
    wait_for(tmp_path / "pid_0")
    agent.send_signal(signal.SIGINT)
    assert agent.wait(timeout=15) == 75
    said = agent.stderr.read()
    assert "stopped by Ctrl-C before training began" in said and "SIGTERM" not in said


def test_workers_die_with_an_agent_that_gets_sigkill(tmp_path):
    agent = start_agent(worker(SAVE_ON_TERM, tmp_path, 0), 2, tmp_path)
    wait_for(tmp_path / "pid_0", tmp_path / "pid_1")
    pids = [int((tmp_path / f"pid_{rank}").read_text()) for rank in (0, 1)]
    assert all(is_running(pid) for pid in pids)
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its agent"
        time.sleep(0.02)


def test_the_agent_does_not_wait_forever_for_a_rank_that_cannot_be_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_process, "GONE_S", 0.2)
    held = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        monkeypatch.setattr(rank_process.os, "killpg", lambda pid, number: None)  # type: ignore[attr-defined]
        rank = rank_process.RankProcess(3, 0, held, None)
        with pytest.raises(EnvironmentFault, match=f"rank 3, process {held.pid}"):
            rank.kill()
        assert rank.killed, "the agent waited for it again"
    finally:
        held.kill()
        held.wait()


def test_a_workers_child_processes_die_with_it_when_the_job_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(agent_module, "KILL_S", 0.5)
    code = """
        import os, subprocess, sys, time
        if os.environ["RANK"] == "1":
            while not os.path.exists(f"{sys.argv[1]}/child"):
                time.sleep(0.02)
            sys.exit(3)
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        open(f"{sys.argv[1]}/writing", "w").write(str(child.pid))
        os.rename(f"{sys.argv[1]}/writing", f"{sys.argv[1]}/child")
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    """
    assert agent_module.launch(worker(code, tmp_path), 2, tmp_path) == 3
    assert not is_running(int((tmp_path / "child").read_text()))


def test_a_signal_that_was_ignored_when_the_agent_started_stays_ignored(tmp_path):
    """nohup megatrain train … & survives the terminal."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
        assert agent_module.launch(worker(code), 1, tmp_path) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)
