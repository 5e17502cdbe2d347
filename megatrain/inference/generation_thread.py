"""Run a `BatchGenerator` in a thread, and hand its tokens to the event loop of the server."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatrain.inference.batch_generator import BatchGenerator, Token
from megatrain.inference.draw import SamplingSettings

_LOG = logging.getLogger("megatrain")

MAX_FAILURES = 3
"""Steps that may fail one after another until the generator counts as broken."""


_WATCH_S = 0.5
"""Seconds between two looks at a step that may hang."""


@dataclass(frozen=True)
class Event:
    """A token of the reply `reply` of a job, or None if the generator failed and the reply is lost."""

    reply: int
    token: Token | None


class Ticket:
    """One reply in the generator; `events` gets its tokens."""

    def __init__(self, index: int, events: asyncio.Queue[Event]) -> None:
        self.index, self.events = index, events
        self.number: int | None = None  # the generator's; only its thread uses it
        self.is_open = True


class GenerationThread:
    """The thread. `submit` and `cancel` are called in the event loop; only the thread touches the generator.

    A step of more than `step_limit_s` seconds counts as hanging: its replies are given up.
    """

    def __init__(self, generator: BatchGenerator, loop: asyncio.AbstractEventLoop, step_limit_s: float) -> None:
        self.generator, self._loop, self.step_limit_s = generator, loop, step_limit_s
        self.failures = 0
        self._open: set[Ticket] = set()
        self._busy_since: float | None = None
        self._condition = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._tickets: dict[int, Ticket] = {}
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()
        self._watcher = loop.call_later(_WATCH_S, self._watch)

    @property
    def num_open(self) -> int:
        """Replies that somebody waits for."""
        return len(self._open)

    @property
    def hangs(self) -> bool:
        """Whether the current step takes longer than the limit."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > self.step_limit_s

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives, its last steps did not all fail, and the current one does not hang."""
        return self._thread.is_alive() and self.failures < MAX_FAILURES and not self.hangs

    def submit(
        self, prompt_ids: Sequence[int], settings: SamplingSettings, index: int, events: asyncio.Queue[Event]
    ) -> Ticket:
        """Ask for a reply to a prompt that `BatchGenerator.check` accepts."""
        ticket = Ticket(index, events)
        self._open.add(ticket)

        def add() -> None:
            ticket.number = self.generator.add(prompt_ids, settings)
            self._tickets[ticket.number] = ticket

        self._command(add)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Free the slot of a reply that nobody waits for any longer."""
        if not ticket.is_open:
            return
        self._close(ticket)

        def drop() -> None:
            if ticket.number is not None and self._tickets.pop(ticket.number, None) is not None:
                self.generator.cancel(ticket.number)

        self._command(drop)

    def stop(self) -> None:
        """End the thread after its current step, unless that hangs."""
        self._watcher.cancel()
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        self._thread.join(timeout=0 if self.hangs else 10)

    def _watch(self) -> None:
        """Give up the replies of a step that hangs."""
        if self.hangs and self._open:
            _LOG.error("a step of the generator takes more than %g seconds; its replies are lost", self.step_limit_s)
            for ticket in list(self._open):
                ticket.events.put_nowait(Event(ticket.index, None))
                self.cancel(ticket)
        self._watcher = self._loop.call_later(_WATCH_S, self._watch)

    def _command(self, command: Callable[[], None]) -> None:
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._commands or self._is_stopping or self._tickets)
                if self._is_stopping:
                    return
                commands, self._commands = self._commands, []
            self._busy_since = time.monotonic()
            try:
                for command in commands:
                    command()
                tokens = self.generator.step()
            except Exception:
                _LOG.exception("a step of the generator failed")
                self._start_afresh()
                continue
            finally:
                self._busy_since = None
            self.failures = 0
            events = []
            for token in tokens:
                ticket = self._tickets[token.request] if token.finish is None else self._tickets.pop(token.request)
                events.append((ticket, token))
            if events:
                self._post(events)

    def _start_afresh(self) -> None:
        """Give up every reply, and go on with an empty generator."""
        self.failures += 1
        lost, self._tickets = list(self._tickets.values()), {}
        self._post([(ticket, None) for ticket in lost])
        try:
            self.generator.reset()
        except Exception:
            self.failures = MAX_FAILURES
            _LOG.exception("the generator cannot be emptied")

    def _post(self, events: Sequence[tuple[Ticket, Token | None]]) -> None:
        def deliver() -> None:
            for ticket, token in events:
                if ticket.is_open:
                    ticket.events.put_nowait(Event(ticket.index, token))
                    if token is None or token.finish is not None:
                        self._close(ticket)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)

    def _close(self, ticket: Ticket) -> None:
        ticket.is_open = False
        self._open.remove(ticket)
