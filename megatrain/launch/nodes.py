"""What the agents of a job's nodes tell one another: one TCP connection from each to node 0's agent, JSON lines on it.

Agents act together. Each says how its ranks fare (`tell`), sees how all others' do (`states`), and at the start and the
end of a start all exchange a value (`all_gather`), after which every agent knows the same and decides alike. A connection
that closes is a node that is gone. There are no threads: an agent forks, and looks at its connections when it is asked.
Imports no torch.
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

WORKS, STILL, DONE, FAILED, HANGS = "works", "still", "done", "failed", "hangs"
"""How a node's ranks fare: `still` where none has moved for long, `hangs` is node 0's verdict on all of them."""

PORTS = range(20000, 32000)
"""Where node 0 listens: below the ports that Linux hands out by itself."""

ALTERNATIVES = 8
"""Ports that are tried, should others be taken."""

WELCOME_S = 5.0
"""Seconds for an answer on one of the ports, until the next is tried."""

KEEPALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 11000}
"""A machine that loses power closes no connection: the kernel asks after 3 s of silence and gives up 8 s later."""


class Peers(Protocol):
    """The agents of a job as one of them sees them; `address` is where node 0 is reached."""

    node: int
    size: int
    address: str

    def tell(self, state: str) -> None:
        """Say how this node's ranks fare."""

    def states(self) -> list[str]:
        """How each node's ranks fare, as last heard. Raises EnvironmentFault where an agent is gone."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every agent's JSON value, in node order, once all have called this; all states are `works` again then.

        Raises EnvironmentFault where an agent is gone, or keeps the others waiting for too long.
        """

    def gather_to_first(self, value: Any) -> list[Any]:
        """As `all_gather`, but node 0 alone gets the values, the others none: what each says at length is not sent to all."""

    def close(self) -> None:
        """Leave."""


class Alone:
    """A job of one node."""

    node, size, address = 0, 1, "127.0.0.1"

    def __init__(self) -> None:
        self._state = WORKS

    def tell(self, state: str) -> None:
        """Remembers it."""
        self._state = state

    def states(self) -> list[str]:
        """What was told last."""
        return [self._state]

    def all_gather(self, value: Any) -> list[Any]:
        """No one else to hear from."""
        self._state = WORKS
        return [value]

    def gather_to_first(self, value: Any) -> list[Any]:
        """No one else to hear from."""
        return self.all_gather(value)

    def close(self) -> None:
        """Nothing to leave."""


def ports(key: str) -> list[int]:
    """Where node 0's agent of the job `key` may listen, in the order in which all try them."""
    groups = len(PORTS) // ALTERNATIVES
    first = PORTS.start + zlib.crc32(key.encode()) % groups * ALTERNATIVES
    return list(range(first, first + ALTERNATIVES))


def connect(key: str, node: int, size: int, address: str, timeout_s: float) -> Peers:
    """Meet the agents of the other nodes. `key` is the same on all nodes of a job and on no other job's.

    Raises EnvironmentFault where they do not meet within `timeout_s`, saying who is missing or where nobody answered.
    """
    if size == 1:
        return Alone()
    if node == 0:
        return _Team(0, size, address, _gather(key, size, timeout_s), timeout_s)
    return _Team(node, size, address, {0: _call(key, node, address, timeout_s)}, timeout_s)


# ---------------------------------------------------------------------------------------------------- connections


class _Gone(Exception):
    """The other end of a connection is no more."""


class _Link:
    """One connection: whole JSON lines in and out."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.socket = connection
        self.name = name
        self._received = b""
        connection.settimeout(WELCOME_S)  # for sending: a few hundred bytes, which only a dead machine does not take
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def fileno(self) -> int:
        """For poll()."""
        return self.socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise _Gone from error

    def receive(self) -> list[dict[str, Any]]:
        """The messages that came; call when poll() says that something did."""
        try:
            arrived = self.socket.recv(1 << 16)
        except OSError as error:
            raise _Gone from error
        if not arrived:
            raise _Gone
        *lines, self._received = (self._received + arrived).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise _Gone from error
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        self.socket.close()


def _readable(links: Iterable[Any], seconds: float) -> set[int]:
    """The file numbers on which something came within so many seconds."""
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
        f"the agents of the nodes cannot meet: ports {tried[0]} to {tried[-1]} of {socket.gethostname()} are all taken"
    )


def _gather(key: str, size: int, timeout_s: float) -> dict[int, _Link]:
    """On node 0: wait for all others."""
    deadline = time.monotonic() + timeout_s
    _allow_files(2 * size + 256)
    members: dict[int, _Link] = {}
    strangers: list[_Link] = []
    with _listen(ports(key)) as listener:
        while len(members) < size - 1:
            if time.monotonic() > deadline:
                missing = [str(node) for node in range(1, size) if node not in members]
                text = (
                    f"no word from the agents of node {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''} "
                    f"(counted from 0) within {timeout_s:g} s (launch.timeout_s); node 0 listens on "
                    f"{socket.gethostname()}:{listener.getsockname()[1]}"
                )
                _say_gone(members.values(), text)
                raise EnvironmentFault(text)
            ready = _readable([listener, *strangers], 0.2)
            if listener.fileno() in ready:
                strangers.append(_Link(listener.accept()[0], "a stranger"))
            for link in [link for link in strangers if link.fileno() in ready]:
                strangers.remove(link)
                _admit(link, key, size, members)
    for link in strangers:
        link.close()
    return members


def _allow_files(number: int) -> None:
    """Let this process have so many files open, as far as the system does: 1024, as usual, are too few for a thousand nodes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _admit(link: _Link, key: str, size: int, members: dict[int, _Link]) -> None:
    """Take the one who calls in, if this job's."""
    try:
        hello = link.receive()[:1]
        node = hello[0].get("node") if hello and hello[0].get("job") == key else None
        if not isinstance(node, int) or not 0 < node < size:
            raise _Gone
        link.name = f"node {node}, {hello[0].get('host')}"
        link.send({"welcome": key})
    except _Gone:
        link.close()
        return
    if node in members:
        members[node].close()  # it had given up waiting for an answer and called again
    members[node] = link


def _say_gone(links: Iterable[_Link], text: str) -> None:
    """Tell these agents who keeps the job from going on; then they end."""
    for link in links:
        with suppress(_Gone, OSError):
            link.send({"gone": text})
            link.socket.shutdown(socket.SHUT_WR)
            link.socket.setblocking(False)
            while link.socket.recv(1 << 16):  # closing with something unread could take the word back (a reset)
                continue


def _call(key: str, node: int, address: str, timeout_s: float) -> _Link:
    """On another node: reach node 0, on whichever of its ports."""
    deadline = time.monotonic() + timeout_s
    problem = "nobody listens"
    while time.monotonic() < deadline:
        for port in ports(key):
            try:
                link = _Link(socket.create_connection((address, port), timeout=WELCOME_S), f"node 0, {address}")
            except OSError as error:
                problem = str(error)
                continue
            with suppress(_Gone):
                link.send({"job": key, "node": node, "host": socket.gethostname()})
                if _readable([link], WELCOME_S) and {"welcome": key} in link.receive():
                    return link
            link.close()
            problem = f"port {port} answers, but is not this job's"
        time.sleep(0.2)
    raise EnvironmentFault(
        f"the agent of node {node}, {socket.gethostname()}, could not reach node 0's at {address}, ports "
        f"{ports(key)[0]} to {ports(key)[-1]}, within {timeout_s:g} s (launch.timeout_s): {problem}"
    )


# ---------------------------------------------------------------------------------------------------- the team


class _Team:
    """Several nodes. Node 0 has a link to each, and passes on what they say; every other has one to node 0."""

    def __init__(self, node: int, size: int, address: str, links: dict[int, _Link], timeout_s: float) -> None:
        self.node = node
        self.size = size
        self.address = address
        self._links = links
        self._timeout_s = timeout_s
        self._states = [WORKS] * size
        self._values: dict[int, Any] = {}
        self._shared: list[Any] | None = None

    def tell(self, state: str) -> None:
        """Say how this node's ranks fare, where that is news."""
        if state != self._states[self.node]:
            self._states[self.node] = state
            self._send_all({"state": state, "node": self.node})

    def states(self) -> list[str]:
        """How each node's ranks fare, as last heard."""
        self._receive(0.0)
        return list(self._states)

    def all_gather(self, value: Any) -> list[Any]:
        """Every agent's value: node 0 collects them and hands them out."""
        return self._exchange(value, lambda values: values)

    def gather_to_first(self, value: Any) -> list[Any]:
        """Every agent's value on node 0, which tells the others no more than that it has them all."""
        return self._exchange(value, lambda values: [])

    def _exchange(self, value: Any, answer: Callable[[list[Any]], list[Any]]) -> list[Any]:
        if self.node == 0:
            self._values[0] = value
            self._wait(lambda: len(self._values) == self.size)
            shared = [self._values[node] for node in range(self.size)]
            self._values = {}
            self._states = [WORKS] * self.size
            self._send_all({"shared": answer(shared)})
        else:
            self._send_all({"value": value, "node": self.node})
            self._wait(lambda: self._shared is not None)
            assert self._shared is not None, "waited for"
            shared, self._shared = self._shared, None
        return shared

    def close(self) -> None:
        """Leave; to the others that is as good as vanishing, so all leave together, after they have shared the end."""
        for link in self._links.values():
            link.close()

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not done():
            if time.monotonic() > deadline:
                silent = [link.name for node, link in self._links.items() if node not in self._values]
                raise EnvironmentFault(
                    f"no answer from the agent of {'; '.join(silent[:8])} within {self._timeout_s:g} s (launch.timeout_s)"
                )
            self._receive(0.2)

    def _receive(self, seconds: float) -> None:
        """Take in what came within so many seconds, and pass on what all have to know."""
        for number in _readable(self._links.values(), seconds):
            node, link = next((node, link) for node, link in self._links.items() if link.fileno() == number)
            try:
                messages = link.receive()
            except _Gone:
                self._mourn(link)
            for message in messages:
                self._hear(node, message)

    def _hear(self, sender: int, message: dict[str, Any]) -> None:
        if "gone" in message:
            raise EnvironmentFault(message["gone"])
        if "shared" in message:
            self._shared = message["shared"]
            self._states = [WORKS] * self.size  # here: what comes in the same breath is news already
        elif "value" in message:
            self._values[sender] = message["value"]
        elif "state" in message:
            self._states[message["node"]] = message["state"]
            if self.node == 0:
                self._send_all(message, but=sender)

    def _send_all(self, message: dict[str, Any], but: int | None = None) -> None:
        for node, link in self._links.items():
            if node != but:
                try:
                    link.send(message)
                except _Gone:
                    self._mourn(link)

    def _mourn(self, lost: _Link) -> None:
        """An agent is gone: tell the others which, for to them it is node 0's agent that will be gone."""
        text = f"the agent of {lost.name}, is gone (killed, or its machine or network failed); this job ends"
        _say_gone([link for link in self._links.values() if link is not lost], text)
        raise EnvironmentFault(text)
