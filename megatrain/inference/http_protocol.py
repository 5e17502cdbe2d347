"""uvicorn's protocol with limits on what comes before a body, which no key protects."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 2**16
"""Bytes of a request's address and headers."""
HEAD_LIMIT_S = 15.0
"""Seconds from a connection, or from a later request's first byte, until the headers are there."""


class LimitedProtocol(HttpToolsProtocol):
    """A connection. It is closed if a request's headers are too long (status 400) or too slow."""

    _size = 0
    _unfinished = 0
    _timer: asyncio.TimerHandle | None = None
    _answered: Any = None
    """The request that is being answered; uvicorn keeps the last one that came, which may be another."""

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for headers."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes. A header of any length comes here before the parser has all of it."""
        super().data_received(data)
        if self._timer is not None and not self.transport.is_closing():
            self._unfinished += len(data)  # perhaps with the end of a body before
            if self._unfinished > 4 * MAX_HEAD:
                self.send_400_response("The headers are too long.")

    def on_message_begin(self) -> None:
        """Begin to wait for a later request's headers."""
        super().on_message_begin()
        self._size = 0
        if self._timer is None:
            self._wait()

    def on_url(self, url: bytes) -> None:
        """Take a part of the address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin the request."""
        self._stop_waiting()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; a request whose body it is gets no other answer."""
        self._leave()
        super().send_400_response(msg)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _leave(self) -> None:
        """Tell the request that is being answered that its client has left."""
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > MAX_HEAD:
            raise ValueError(f"headers of more than {MAX_HEAD} bytes")  # which the parser reports as a bad request

    def _wait(self) -> None:
        self._timer = self.loop.call_later(HEAD_LIMIT_S, lambda: self.transport.close())

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._unfinished = None, 0
