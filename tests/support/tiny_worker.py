"""A server process without a model, for the tests of several workers: it answers each connection with its number."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time


def answer(listener, code, alive):
    """Answer until the process ends; end at once with `code` if it is not 0."""
    if code:
        sys.exit(code)
    listener.setblocking(True)
    threading.Thread(target=_beat, args=(alive,), daemon=True).start()
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(f"{os.getpid()}".encode())


def drain(listener, alive):
    """After TERM take no more, but never end."""
    signal.signal(signal.SIGTERM, lambda number, frame: listener.close())
    _beat(alive)


def hang_once(listener, path, alive):
    """Give one sign of life and hang. The process after that answers."""
    if path.exists():
        answer(listener, 0, alive)
    path.touch()
    alive.value = time.monotonic()
    time.sleep(3600)


def _beat(alive):
    while True:
        alive.value = time.monotonic()
        time.sleep(0.1)
