"""Communication between the agents of a job's nodes: states and collectives, over a TCP star around node 0.

Each agent reports the state of its ranks (`report_state`) and reads the other nodes' states (`states`). Before and
after each start of the workers all agents exchange values (`all_gather`), and decide alike because they see the same
values. A closed connection means a lost node. There are no threads, because an agent forks: connections are read only
inside these calls. Imports no torch.
"""

from __future__ import annotations

import json
import resource
import select
import socket
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol

from megatrain.errors import EnvironmentFault

RUNNING, STALLED, DONE, FAILED, HUNG = "running", "stalled", "done", "failed", "hung"
"""States of a node's ranks. `stalled`: no heartbeat within the limits. `hung` is node 0's verdict on the whole job."""

PORTS = range(20000, 32000)
"""Ports on which node 0 may listen: below Linux's ephemeral ports."""

ALTERNATIVES = 8
"""Number of ports per job, tried in turn."""

WELCOME_S = 5.0
"""Seconds to wait for an answer on one port before trying the next."""

KEEPALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 11000}
"""A machine that loses power closes no connection: TCP probes it after 3 s of silence and gives up 8 s later."""


class Peers(Protocol):
    """The agents of a job's `size` nodes, as seen from node number `node`. `address` is node 0's."""

    node: int
    size: int
    address: str

    def report_state(self, state: str) -> None:
        """Report the state of this node's ranks."""

    def states(self) -> list[str]:
        """Return the last known state of each node. Raises EnvironmentFault if an agent is gone."""

    def all_gather(self, value: Any) -> list[Any]:
        """Return every agent's JSON value, in node order, once all have called this. Resets all states to `running`.

        Raises EnvironmentFault if an agent is gone or does not answer in time.
        """

    def gather_to_first(self, value: Any) -> list[Any]:
        """Gather like `all_gather`, but return the values on node 0 only, else an empty list. For large values."""

    def close(self) -> None:
        """Close the connections."""


class SingleNode:
    """The `Peers` of a job on a single node."""

    node, size, address = 0, 1, "127.0.0.1"

    def __init__(self) -> None:
        self._state = RUNNING

    def report_state(self, state: str) -> None:
        """Store the state."""
        self._state = state

    def states(self) -> list[str]:
        """Return the state reported last."""
        return [self._state]

    def all_gather(self, value: Any) -> list[Any]:
        """Return `[value]`."""
        self._state = RUNNING
        return [value]

    def gather_to_first(self, value: Any) -> list[Any]:
        """Return `[value]`."""
        return self.all_gather(value)

    def close(self) -> None:
        """Do nothing: there are no connections."""


def ports(key: str) -> list[int]:
    """Return the ports on which node 0 may listen for the job `key`, in the order in which they are tried."""
    groups = len(PORTS) // ALTERNATIVES
    first = PORTS.start + zlib.crc32(key.encode()) % groups * ALTERNATIVES
    return list(range(first, first + ALTERNATIVES))


def connect(key: str, node: int, size: int, address: str, timeout_s: float) -> Peers:
    """Connect to the agents of the other nodes. `key` identifies the job: the same on all its nodes, unique among jobs.

    Raises:
        EnvironmentFault: some did not connect within `timeout_s` seconds. The message names them or the address.
    """
    if size == 1:
        return SingleNode()
    if node == 0:
        return _ConnectedPeers(0, size, address, _accept_all(key, size, timeout_s), timeout_s)
    return _ConnectedPeers(node, size, address, {0: _connect_to_first(key, node, address, timeout_s)}, timeout_s)


# ---------------------------------------------------------------------------------------------------- connections


class _ConnectionLost(Exception):
    """The other end of a connection is gone, or sent something that is not JSON."""


class _Link:
    """A connection that carries JSON messages, one per line."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.socket = connection
        self.name = name
        self._received = b""
        connection.settimeout(WELCOME_S)  # for sending: messages are short, so only a dead machine blocks
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def fileno(self) -> int:
        """Return the socket's file descriptor, for poll()."""
        return self.socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. Raises _ConnectionLost if the other end is gone."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise _ConnectionLost from error

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived; to be called when poll() reports data. Raises _ConnectionLost."""
        try:
            arrived = self.socket.recv(1 << 16)
        except OSError as error:
            raise _ConnectionLost from error
        if not arrived:
            raise _ConnectionLost
        *lines, self._received = (self._received + arrived).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise _ConnectionLost from error
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


def _readable(links: Iterable[Any], seconds: float) -> set[int]:
    """Return the file descriptors that become readable within `seconds`."""
    poll = select.poll()
    for link in links:
        poll.register(link.fileno(), select.POLLIN)
    return {number for number, _ in poll.poll(max(0.0, seconds) * 1000)}


def _listen(candidates: Iterable[int]) -> socket.socket:
    tried = list(candidates)
    for port in tried:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(4096)
            return listener
        except OSError:
            listener.close()
    raise EnvironmentFault(
        f"the agents of the nodes cannot connect: ports {tried[0]} to {tried[-1]} of {socket.gethostname()} are all "
        f"taken"
    )


def _accept_all(key: str, size: int, timeout_s: float) -> dict[int, _Link]:
    """Accept the connections of all other nodes, and return them by node. Runs on node 0."""
    deadline = time.monotonic() + timeout_s
    _raise_file_limit(2 * size + 256)
    members: dict[int, _Link] = {}
    unidentified: list[_Link] = []
    with _listen(ports(key)) as listener:
        while len(members) < size - 1:
            if time.monotonic() > deadline:
                missing = [str(node) for node in range(1, size) if node not in members]
                text = (
                    f"no connection from the agents of node {', '.join(missing[:8])}"
                    f"{', ...' if len(missing) > 8 else ''} (counted from 0) within {timeout_s:g} s (launch.timeout_s);"
                    f" node 0 listens on "
                    f"{socket.gethostname()}:{listener.getsockname()[1]}"
                )
                _announce_loss(members.values(), text)
                raise EnvironmentFault(text)
            ready = _readable([listener, *unidentified], 0.2)
            if listener.fileno() in ready:
                unidentified.append(_Link(listener.accept()[0], "an unidentified client"))
            for link in [link for link in unidentified if link.fileno() in ready]:
                unidentified.remove(link)
                _admit(link, key, size, members)
    for link in unidentified:
        link.close()
    return members


def _raise_file_limit(number: int) -> None:
    """Raise this process's limit on open files to `number`, as far as the system allows.

    The usual limit of 1024 is too low for a thousand nodes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _admit(link: _Link, key: str, size: int, members: dict[int, _Link]) -> None:
    """Identify a new connection, and add it to the members if it belongs to this job."""
    try:
        hello = link.receive()[:1]
        node = hello[0].get("node") if hello and hello[0].get("job") == key else None
        if not isinstance(node, int) or not 0 < node < size:
            raise _ConnectionLost
        link.name = f"node {node}, {hello[0].get('host')}"
        link.send({"welcome": key})
    except _ConnectionLost:
        link.close()
        return
    if node in members:
        members[node].close()  # it gave up waiting for an answer and connected again
    members[node] = link


def _announce_loss(links: Iterable[_Link], text: str) -> None:
    """Tell these agents why the job cannot go on, so that they exit."""
    for link in links:
        with suppress(_ConnectionLost, OSError):
            link.send({"gone": text})
            link.socket.shutdown(socket.SHUT_WR)
            link.socket.setblocking(False)
            # drain it: closing with unread data resets the connection, which could drop the message
            while link.socket.recv(1 << 16):
                continue


def _connect_to_first(key: str, node: int, address: str, timeout_s: float) -> _Link:
    """Connect to node 0 on whichever of its ports answers. Runs on all other nodes."""
    deadline = time.monotonic() + timeout_s
    problem = "nothing listens there"
    while time.monotonic() < deadline:
        for port in ports(key):
            try:
                link = _Link(socket.create_connection((address, port), timeout=WELCOME_S), f"node 0, {address}")
            except OSError as error:
                problem = str(error)
                continue
            with suppress(_ConnectionLost):
                link.send({"job": key, "node": node, "host": socket.gethostname()})
                if _readable([link], WELCOME_S) and {"welcome": key} in link.receive():
                    return link
            link.close()
            problem = f"port {port} answers, but belongs to another job or program"
        time.sleep(0.2)
    raise EnvironmentFault(
        f"the agent of node {node}, {socket.gethostname()}, could not reach node 0's at {address}, ports "
        f"{ports(key)[0]} to {ports(key)[-1]}, within {timeout_s:g} s (launch.timeout_s): {problem}"
    )


# ---------------------------------------------------------------------------------------------------- several nodes


class _ConnectedPeers:
    """The `Peers` of a job on several nodes. Each has a link to node 0 only, which forwards their states."""

    def __init__(self, node: int, size: int, address: str, links: dict[int, _Link], timeout_s: float) -> None:
        self.node = node
        self.size = size
        self.address = address
        self._links = links
        self._timeout_s = timeout_s
        self._states = [RUNNING] * size
        self._values: dict[int, Any] = {}
        self._shared: list[Any] | None = None

    def report_state(self, state: str) -> None:
        """Send the state of this node's ranks if it has changed."""
        if state != self._states[self.node]:
            self._states[self.node] = state
            self._send_all({"state": state, "node": self.node})

    def states(self) -> list[str]:
        """Return the last known state of each node."""
        self._receive(0.0)
        return list(self._states)

    def all_gather(self, value: Any) -> list[Any]:
        """Return every agent's value: node 0 gathers and broadcasts them."""
        return self._exchange(value, lambda values: values)

    def gather_to_first(self, value: Any) -> list[Any]:
        """Return every agent's value on node 0, an empty list on the others."""
        return self._exchange(value, lambda values: [])

    def _exchange(self, value: Any, answer: Callable[[list[Any]], list[Any]]) -> list[Any]:
        if self.node == 0:
            self._values[0] = value
            self._wait(lambda: len(self._values) == self.size)
            shared = [self._values[node] for node in range(self.size)]
            self._values = {}
            self._states = [RUNNING] * self.size
            self._send_all({"shared": answer(shared)})
        else:
            self._send_all({"value": value, "node": self.node})
            self._wait(lambda: self._shared is not None)
            assert self._shared is not None, "_wait returned"
            shared, self._shared = self._shared, None
        return shared

    def close(self) -> None:
        """Close the connections. It looks like a lost node to the others, so wait until all agree on the outcome."""
        for link in self._links.values():
            link.close()

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not done():
            if time.monotonic() > deadline:
                silent = [link.name for node, link in self._links.items() if node not in self._values]
                raise EnvironmentFault(
                    f"no answer from the agent of {'; '.join(silent[:8])} within {self._timeout_s:g} s "
                    f"(launch.timeout_s)"
                )
            self._receive(0.2)

    def _receive(self, seconds: float) -> None:
        """Handle the messages that arrive within `seconds`."""
        for number in _readable(self._links.values(), seconds):
            node, link = next((node, link) for node, link in self._links.items() if link.fileno() == number)
            try:
                messages = link.receive()
            except _ConnectionLost:
                self._fail_job(link)
            for message in messages:
                self._handle(node, message)

    def _handle(self, sender: int, message: dict[str, Any]) -> None:
        if "gone" in message:
            raise EnvironmentFault(message["gone"])
        if "shared" in message:
            self._shared = message["shared"]
            # reset here and not in `_exchange`: states that arrive together with this message are newer
            self._states = [RUNNING] * self.size
        elif "value" in message:
            self._values[sender] = message["value"]
        elif "state" in message:
            self._states[message["node"]] = message["state"]
            if self.node == 0:
                self._send_all(message, except_node=sender)

    def _send_all(self, message: dict[str, Any], except_node: int | None = None) -> None:
        for node, link in self._links.items():
            if node != except_node:
                try:
                    link.send(message)
                except _ConnectionLost:
                    self._fail_job(link)

    def _fail_job(self, lost: _Link) -> None:
        """Tell the others, which have a link to node 0 only, which agent is lost; raise EnvironmentFault."""
        text = f"the agent of {lost.name}, is gone (killed, or its machine or network failed); this job ends"
        _announce_loss([link for link in self._links.values() if link is not lost], text)
        raise EnvironmentFault(text)
