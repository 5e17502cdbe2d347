"""Agents of several nodes, run as threads: what they learn from one another, and which lost node is named."""

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
    """Return a job key that no other test uses."""
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
    """Wait until an agent knows of this state, and return all the states that it knows."""
    deadline = time.monotonic() + seconds
    while state not in (states := agent.states()):
        assert time.monotonic() < deadline, states
        time.sleep(0.01)
    return states


def test_a_single_agent_sees_its_own_state():
    alone = nodes.connect("job", 0, 1, "nowhere.invalid", 1.0)
    alone.report_state(FAILED)
    assert alone.states() == [FAILED]
    assert alone.all_gather({"a": 1}) == [{"a": 1}]
    assert alone.states() == [RUNNING]


def test_all_agents_see_a_state_until_the_next_all_gather(pool):
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


def test_a_state_sent_right_after_an_all_gather_reaches_a_slow_agent(pool):
    """A node whose ranks end at once sends its state once; an agent that missed it would wait for that node forever."""
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


def test_gathered_values_reach_only_node_0(pool):
    """Otherwise the stacks of all ranks of a thousand nodes would be sent to every node."""
    agents = team(pool, 3)
    gathered = [pool.submit(agent.gather_to_first, agent.node) for agent in agents]
    assert [one.result(10) for one in gathered] == [[0, 1, 2], [], []]
    for agent in agents:
        agent.close()


def test_node_0_may_hold_a_connection_to_each_of_a_thousand_nodes():
    program = (
        "import resource as r; from megatrain.launch.nodes import _raise_file_limit; "
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (64, hard)); "
        "_raise_file_limit(200); print(r.getrlimit(r.RLIMIT_NOFILE)[0]); "
        "_raise_file_limit(100); print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["200", "200"], done.stderr


@pytest.mark.parametrize("gone", [0, 1])
def test_every_agent_names_the_node_that_is_gone(pool, gone):
    agents = team(pool, 3)
    agents[gone].close()
    remaining = [agent for agent in agents if agent.node != gone]
    if gone != 0:
        with pytest.raises(EnvironmentFault, match=f"node {gone}, {socket.gethostname()}, is gone"):
            heard(agents[0], FAILED)
        remaining.remove(agents[0])
    for agent in remaining:
        with pytest.raises(EnvironmentFault, match=rf"node {gone}, .* is gone"):
            agent.all_gather(1)


def test_a_killed_agent_is_noticed_at_once(pool):
    job = key()
    program = (
        "import sys, time; from megatrain.launch import nodes; "
        "nodes.connect(sys.argv[1], 1, 2, '127.0.0.1', 20).all_gather(0); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, job])
    agent = nodes.connect(job, 0, 2, "127.0.0.1", 20)
    assert agent.all_gather("hello") == ["hello", 0]
    other.send_signal(signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(EnvironmentFault, match="node 1"):
        heard(agent, FAILED)
    assert time.monotonic() - started < 2
    other.wait()


def test_a_node_that_never_connects_is_named_with_the_address_that_waits_for_it(pool):
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


def test_ports_of_other_programs_are_skipped(pool):
    """One port belongs to a program that never answers, one to another job's agent."""
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


def test_connections_from_strangers_are_closed(pool):
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
