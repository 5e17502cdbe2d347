"""Run a `BatchGenerator` in a thread, and hand its tokens to the event loop of the server."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatrain.inference.batch_generator import BatchGenerator, Token
from megatrain.inference.draw import SamplingSettings

_LOG = logging.getLogger("megatrain")

MAX_FAILURES = 3
"""Steps that may fail one after another until the generator counts as broken."""


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
    """The thread. `submit` and `cancel` are called in the event loop; only the thread touches the generator."""

    def __init__(self, generator: BatchGenerator, loop: asyncio.AbstractEventLoop) -> None:
        self.generator, self._loop = generator, loop
        self.num_open = 0
        self.failures = 0
        self._condition = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._tickets: dict[int, Ticket] = {}
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives and its last steps did not all fail."""
        return self._thread.is_alive() and self.failures < MAX_FAILURES

    def submit(
        self, prompt_ids: Sequence[int], settings: SamplingSettings, index: int, events: asyncio.Queue[Event]
    ) -> Ticket:
        """Ask for a reply to a prompt that `BatchGenerator.check` accepts."""
        ticket = Ticket(index, events)
        self.num_open += 1

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
        """End the thread after its current step."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        self._thread.join(timeout=10)

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
            try:
                for command in commands:
                    command()
                tokens = self.generator.step()
            except Exception:
                _LOG.exception("a step of the generator failed")
                self._start_afresh()
                continue
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
        self.num_open -= 1
