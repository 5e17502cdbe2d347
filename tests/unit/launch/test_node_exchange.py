"""Agents of several nodes, as threads here: what they hear of one another, and who is named when one is gone."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatrain.errors import EnvironmentFault
from megatrain.launch import nodes
from megatrain.launch.nodes import DONE, FAILED, RUNNING


def key():
    """A job of this test's own."""
    return f"{os.getpid()}.{time.monotonic_ns()}"


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as executor:
        yield executor


def team(pool, size, job=None, timeout_s=10.0):
    job = job or key()
    started = [pool.submit(nodes.connect, job, node, size, "127.0.0.1", timeout_s) for node in reversed(range(size))]
    return [one.result(20) for one in reversed(started)]


def heard(agent, state, seconds=5.0):
    """What an agent knows once it has heard of this state."""
    deadline = time.monotonic() + seconds
    while state not in (states := agent.states()):
        assert time.monotonic() < deadline, states
        time.sleep(0.01)
    return states


def test_alone_one_hears_oneself():
    alone = nodes.connect("job", 0, 1, "nowhere.invalid", 1.0)
    alone.report_state(FAILED)
    assert alone.states() == [FAILED]
    assert alone.all_gather({"a": 1}) == [{"a": 1}]
    assert alone.states() == [RUNNING]


def test_all_hear_what_one_tells_until_they_share_again(pool):
    agents = team(pool, 3)
    agents[1].report_state(DONE)
    agents[0].states()  # node 0 passes it on when it looks
    assert heard(agents[2], DONE) == [RUNNING, DONE, RUNNING]
    agents[0].report_state(FAILED)
    for agent in agents[1:]:
        assert heard(agent, FAILED) == [FAILED, DONE, RUNNING]
    long = "x" * 200_000  # more than one read
    shared = [pool.submit(agent.all_gather, [agent.node, long]) for agent in agents]
    assert [one.result(10) for one in shared] == [[[node, long] for node in range(3)]] * 3
    assert [agent.states() for agent in agents] == [[RUNNING] * 3] * 3
    for agent in agents:
        agent.close()


def test_what_is_told_right_after_a_share_is_heard_by_who_was_slow_to_look(pool):
    """A node whose ranks end at once says so once; who overheard it would wait for that node for ever."""
    agents = team(pool, 3)
    agents[2]._send_all({"value": 2, "node": 2})  # it has said its value, and looks at its connection only later
    for shared in [pool.submit(agent.all_gather, agent.node) for agent in agents[:2]]:
        assert shared.result(10) == [0, 1, 2]
    agents[1].report_state(DONE)
    heard(agents[0], DONE)
    time.sleep(0.1)
    agents[2]._wait(lambda: agents[2]._shared is not None)
    agents[2]._send_all = lambda message: None  # it has been sent
    assert agents[2].all_gather(2) == [0, 1, 2]
    assert agents[2].states() == [RUNNING, DONE, RUNNING]
    for agent in agents:
        agent.close()


def test_what_is_gathered_reaches_node_0_alone(pool):
    """The stacks of all ranks of a thousand nodes are not sent to each of them."""
    agents = team(pool, 3)
    told = [pool.submit(agent.gather_to_first, agent.node) for agent in agents]
    assert [one.result(10) for one in told] == [[0, 1, 2], [], []]
    for agent in agents:
        agent.close()


def test_node_0_may_hold_a_connection_to_each_of_a_thousand_nodes():
    program = (
        "import resource as r; from megatrain.launch.nodes import _raise_file_limit; "
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (64, hard)); "
        "_raise_file_limit(200); print(r.getrlimit(r.RLIMIT_NOFILE)[0]); _raise_file_limit(100); print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["200", "200"], done.stderr


@pytest.mark.parametrize("gone", [0, 1])
def test_whoever_is_gone_is_named_to_all(pool, gone):
    agents = team(pool, 3)
    agents[gone].close()
    told = [agent for agent in agents if agent.node != gone]
    if gone != 0:
        with pytest.raises(EnvironmentFault, match=f"node {gone}, {socket.gethostname()}, is gone"):
            heard(agents[0], FAILED)
        told.remove(agents[0])
    for agent in told:
        with pytest.raises(EnvironmentFault, match=rf"node {gone}, .* is gone"):
            agent.all_gather(1)


def test_a_killed_agent_is_noticed_at_once(pool):
    job = key()
    program = "import sys, time; from megatrain.launch import nodes; nodes.connect(sys.argv[1], 1, 2, '127.0.0.1', 20).all_gather(0); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", program, job])
    agent = nodes.connect(job, 0, 2, "127.0.0.1", 20)
    assert agent.all_gather("hello") == ["hello", 0]
    other.send_signal(signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(EnvironmentFault, match="node 1"):
        heard(agent, FAILED)
    assert time.monotonic() - started < 2
    other.wait()


def test_who_never_comes_is_named_with_the_place_where_one_waits(pool):
    job = key()
    waiting = pool.submit(nodes.connect, job, 0, 3, "127.0.0.1", 1.5)
    early = nodes.connect(job, 1, 3, "127.0.0.1", 1.5)
    with pytest.raises(EnvironmentFault, match=rf"node 2 .*within 1.5 s \(launch.timeout_s\).*:{nodes.ports(job)[0]}"):
        waiting.result(10)
    with pytest.raises(EnvironmentFault, match="no connection from the agents of node 2 "):
        early.all_gather(1)


def test_a_head_node_that_cannot_be_reached_is_named_with_its_ports():
    job = key()
    with pytest.raises(EnvironmentFault, match=rf"at 127.0.0.1, ports {nodes.ports(job)[0]} to .*within 0.5 s"):
        nodes.connect(job, 1, 2, "127.0.0.1", 0.5)


def test_ports_taken_by_others_are_passed_over(pool):
    """One by a program that says nothing, one by another job's agent."""
    job = key()
    with socket.socket() as silent, socket.socket() as stranger:
        for taken, port in ((silent, nodes.ports(job)[0]), (stranger, nodes.ports(job)[1])):
            taken.bind(("127.0.0.1", port))
            taken.listen()

        def answer():
            connection = stranger.accept()[0]
            connection.recv(1000)
            connection.sendall(b'{"welcome": "another job"}\n')
            return connection

        answering = pool.submit(answer)
        original = nodes.WELCOME_S
        nodes.WELCOME_S = 0.3
        try:
            agents = team(pool, 2, job)
        finally:
            nodes.WELCOME_S = original
        answering.result(5).close()
        shared = [pool.submit(agent.all_gather, agent.node) for agent in agents]
        assert [one.result(5) for one in shared] == [[0, 1]] * 2


def test_strangers_who_call_in_are_sent_away(pool):
    job = key()
    head = pool.submit(nodes.connect, job, 0, 2, "127.0.0.1", 10)
    hello = b'{"job": "other", "node": 1}\n'
    for said in (b"GET / HTTP/1.0\r\n\r\n", hello, b"[1]\n", b'{"job": "%s", "node": 7}\n' % job.encode()):
        deadline = time.monotonic() + 5
        while True:
            try:
                caller = socket.create_connection(("127.0.0.1", nodes.ports(job)[0]), timeout=5)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        caller.sendall(said)
        assert caller.recv(100) == b"", said
        caller.close()
    agent = nodes.connect(job, 1, 2, "127.0.0.1", 10)
    sharing = threading.Thread(target=agent.all_gather, args=(1,))
    sharing.start()
    assert head.result(5).all_gather(0) == [0, 1]
    sharing.join()
