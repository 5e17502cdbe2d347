"""The terminal of a process: everything that a run prints goes through here, and nothing it does can stop the run.

The reader of a pipe may leave or be slow, a terminal may close, the disk under a redirected stream may fill up, and a
stream may be closed from the start. `Terminal.install` replaces sys.stdout and sys.stderr by streams that survive all
of this. A training job prints from a thread, so that no reader can block it, and writes what it prints to a log too.
Imports no torch.
"""

from __future__ import annotations

import fcntl
import io
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from megatrain.resilience import colours

MAX_WAITING = 1000
"""Number of writes that wait for a slow reader. Further ones go to the log only."""

REDRAW_S = 0.5
"""Seconds between two drawings of the status line."""

CLOSE_S = 2.0
"""Seconds that a process waits at its end for a slow reader."""

ERASE_LINE = b"\r\x1b[K"

_OUT, _ERR = 1, 2

StatusLine = Callable[[int], str]
"""Returns the text of a status line for a width in columns. Called in the background; must not fail."""

_Item = tuple[int, bytes | StatusLine | None]
"""What to print on stream 1 or 2: bytes; a new status line; or None, which ends the status line."""


class Terminal:
    """Standard output and standard error of this process.

    At first, writes go straight to the streams. Errors of standard error are ignored. The first error of standard
    output is raised and kept in `lost`, because the output may be all that the command is for; later output is dropped.
    After `keep_going`, errors of standard output are ignored too. A fork of a process that prints in the background
    prints to the log alone.
    """

    def __init__(self, out: int = _OUT, err: int = _ERR) -> None:
        """`out` and `err` are the file descriptors to write to."""
        self.lost: OSError | None = None
        self.log_path: Path | None = None
        self._files = {_OUT: out, _ERR: err}
        self._raises = True
        self._log: int | None = None
        self._queue: queue.SimpleQueue[_Item | None] | None = None
        self._thread: threading.Thread | None = None
        self._dropped = 0
        self._stuck = False
        self._has_status = False
        self.stdout = self._open(_OUT, sys.stdout, "strict")
        self.stderr = self._open(_ERR, sys.stderr, "backslashreplace")

    @classmethod
    def install(cls) -> Terminal:
        """Make this process print through a `Terminal`, and return it. Streams that are closed lead to /dev/null."""
        open_missing_streams()
        terminal = cls.current()
        if terminal is None:
            terminal = cls()
            sys.stdout, sys.stderr = terminal.stdout, terminal.stderr
            sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
        return terminal

    @staticmethod
    def current() -> Terminal | None:
        """Return the installed terminal, or None."""
        sink = getattr(sys.stderr, "buffer", None)
        return sink.terminal if isinstance(sink, _Sink) else None

    @property
    def has_status_line(self) -> bool:
        """Whether standard error is a terminal that can redraw a line."""
        return self._queue is not None and self.is_tty(_ERR) and os.environ.get("TERM") not in colours.PLAIN_TERMINALS

    def is_tty(self, number: int) -> bool:
        """Return whether a stream (1 or 2) leads to a terminal."""
        return os.isatty(self._files[number])

    # ------------------------------------------------------------------------------------------- for jobs that go on

    def keep_going(self, background: bool = False) -> None:
        """Ignore all errors from now on; in the `background` print from a thread, so that no reader blocks this one."""
        self._raises = False
        for stream in (self.stdout, self.stderr):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        if background and self._queue is None:
            self._queue = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._run, name="terminal", daemon=True)
            self._thread.start()

    def log_to(self, path: Path, redirect: bool = False) -> None:
        """Append to the file `path` whatever is printed from now on.

        With `redirect`, file descriptors 1 and 2 lead to that file alone: output of native libraries and of child
        processes, which this class does not see, goes there and can neither block nor fail at the terminal.

        Raises:
            OSError: the file cannot be opened.
        """
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if os.path.samestat(os.fstat(log), os.fstat(self._files[_ERR])):  # the agent has redirected this rank's output
            os.close(log)
            return
        if redirect:
            if self._files == {_OUT: _OUT, _ERR: _ERR}:
                self._files = {number: fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3) for number in (_OUT, _ERR)}
            for number in (_OUT, _ERR):
                os.dup2(log, number)
        if self._log is not None:
            os.close(self._log)
        self._log, self.log_path = log, path

    def show(self, text: str) -> None:
        """Print a line on standard error that a log has already."""
        self._print(_ERR, f"{text}\n".encode(errors="backslashreplace"))

    def start_status(self, line: StatusLine) -> None:
        """Keep a status line below everything that is printed, redrawn every `REDRAW_S` seconds.

        Only where `has_status_line`.
        """
        assert self._queue is not None, "only a terminal in the background draws a status line"
        self._has_status = True
        self._queue.put((_ERR, line))

    def end_status(self) -> None:
        """Draw the status line for the last time, and leave it on the terminal."""
        if self._queue is not None and self._has_status:
            self._has_status = False
            self._queue.put((_ERR, None))

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Wait until all is printed, but at most `limit_s` seconds if the reader is slow; then print no more."""
        for stream in (self.stdout, self.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        if self._queue is None or self._thread is None:
            return
        self.end_status()
        self._note_dropped()
        self._queue.put(None)
        self._thread.join(limit_s)
        self._stuck = self._thread.is_alive()
        self._queue = None

    # --------------------------------------------------------------------------------------------------- writing

    def _open(self, number: int, replaced: TextIO | None, errors: str) -> io.TextIOWrapper:
        """Return the text stream that takes the place of `replaced`."""
        sink = _Sink(self, number)
        at_once = number == _ERR or sink.isatty() or getattr(replaced, "write_through", False)
        encoding = getattr(replaced, "encoding", None) or "utf-8"
        errors = getattr(replaced, "errors", None) or errors
        return io.TextIOWrapper(sink, encoding, errors, line_buffering=at_once)

    def write(self, number: int, data: bytes) -> None:
        """Write to a stream and to the log. Raises OSError where the output may be all that counts."""
        if self._log is not None:
            with suppress(OSError):
                _write_all(self._log, data)
        self._print(number, data)

    def _print(self, number: int, data: bytes) -> None:
        if number == _ERR and self.is_tty(_ERR) and colours.are_wanted():
            data = colours.paint(data)
        if self._queue is None:
            if not self._stuck:
                self._write_now(number, data)
        elif self._queue.qsize() >= MAX_WAITING:
            self._dropped += data.count(b"\n")
        else:
            self._note_dropped()
            self._queue.put((number, data))

    def _write_now(self, number: int, data: bytes) -> None:
        if number == _OUT and self.lost is not None:
            return
        try:
            _write_all(self._files[number], data)
        except OSError as error:
            if number == _OUT and self._raises:
                self.lost = error
                raise

    def _note_dropped(self) -> None:
        if self._dropped and self._queue is not None:
            where = f"; {self.log_path} has them" if self.log_path else ""
            note = f"megatrain: {self._dropped} lines are missing here, because their reader was too slow{where}\n"
            self._dropped = 0
            self._queue.put((_ERR, note.encode(errors="backslashreplace")))

    # --------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        """Print what is queued, and redraw the status line."""
        # a background job must not be stopped for printing, even where the terminal is set to do so (stty tostop)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        assert self._queue is not None
        waiting, due = self._queue, 0.0
        status: StatusLine | None = None
        at_line_start = True
        while True:
            try:
                item = waiting.get(timeout=REDRAW_S if status is not None else None)
            except queue.Empty:
                item = (_ERR, b"")
            if item is None:
                return
            number, what = item
            if what is None:
                if status is not None and at_line_start:
                    self._draw(status)
                    self._write_now(_ERR, b"\n")
                status = None
                continue
            if not isinstance(what, bytes):
                status, what = what, b""
            if what:
                self._write_now(number, ERASE_LINE + what if at_line_start and self.is_tty(number) else what)
                at_line_start = what.endswith(b"\n")
            if status is not None and at_line_start and (what or time.monotonic() >= due):
                self._draw(status)
                due = time.monotonic() + REDRAW_S

    def _draw(self, line: StatusLine) -> None:
        try:
            width = os.get_terminal_size(self._files[_ERR]).columns
        except OSError:
            width = 0
        width = (width or 80) - 1  # the last column would wrap the line
        self._write_now(_ERR, ERASE_LINE + line(width)[:width].encode(self.stderr.encoding, "replace"))


class _Sink(io.RawIOBase):
    """The bytes of one stream of a terminal."""

    def __init__(self, terminal: Terminal, number: int) -> None:
        self.name = ("<stdin>", "<stdout>", "<stderr>")[number]
        self.terminal = terminal
        self._number = number

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the stream's own file descriptor, 1 or 2."""
        return self._number

    def isatty(self) -> bool:
        """Return whether the stream leads to a terminal."""
        return self.terminal.is_tty(self._number)

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        """Write to the terminal."""
        self.terminal.write(self._number, bytes(data))
        return len(data)


def say(message: str) -> None:
    """Print a message of megatrain on standard error."""
    show(f"megatrain: {message}")


def show(text: str, file: TextIO | None = None) -> None:
    """Print a line on standard error, or on `file`; do nothing if it cannot be printed."""
    stream = file or sys.stderr
    if stream is not None:  # it is None where standard error was closed at the start
        with suppress(OSError, ValueError):
            print(text, file=stream, flush=True)


def keep_log(path: Path) -> None:
    """Append what this process prints to a log too, in a folder that is created; do without if that is impossible."""
    if (terminal := Terminal.current()) is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            terminal.log_to(path)


def open_missing_streams() -> None:
    """Open /dev/null in place of each standard stream that is closed, or the next file opened would take its place."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            assert null == number, "all lower numbers are open"
            os.set_inheritable(null, True)


def _write_all(file: int, data: bytes) -> None:
    """Write all of `data`, waiting where the file is full for now."""
    while data:
        try:
            data = data[os.write(file, data) :]
        except BlockingIOError:  # another process has made the shared file non-blocking
            poll = select.poll()
            poll.register(file, select.POLLOUT)
            poll.poll()
