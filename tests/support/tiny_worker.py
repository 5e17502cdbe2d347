"""A server process without a model, for the tests of several workers: it answers each connection with its number."""

from __future__ import annotations

import os
import sys


def answer(listener, code, is_ready):
    """Answer until the process ends; end at once with `code` if it is not 0."""
    if code:
        sys.exit(code)
    listener.setblocking(True)
    is_ready.release()
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(f"{os.getpid()}".encode())
