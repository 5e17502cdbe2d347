"""The process that runs content checks, apart from the server: a user's code may raise, hang or crash.

It answers each line of JSON on a socket with another. What a check prints goes to standard error. Started by
check_process.py; imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

from megatrain.config import ServeGroup
from megatrain.errors import ConfigError
from megatrain.inference.content_checks import Checks, load_checks
from megatrain.resilience.signals import set_parent_death_signal


def main() -> None:
    """Answer until the socket ends. Arguments: its file descriptor, the server's process, and the keys as JSON."""
    number, parent, keys = sys.argv[1:4]
    if sys.platform == "linux":
        set_parent_death_signal(int(parent))
    sys.path.insert(0, os.getcwd())
    with socket.socket(fileno=int(number)) as connection:
        lines = connection.makefile("rb")
        try:
            checks = load_checks(ServeGroup(**json.loads(keys)))
        except ConfigError as error:
            _send(connection, {"error": str(error)})
            return
        _send(connection, {"hold_back": checks.hold_back})
        for line in lines:
            _send(connection, _answer(checks, json.loads(line)))


def _answer(checks: Checks, request: dict[str, Any]) -> dict[str, Any]:
    text, is_whole = request["text"], request["is_whole"]
    found = (check(text) for check in checks.prompt)
    if request["kind"] == "reply":
        found = (check(text, is_whole) for check in checks.reply)
    try:
        why = next((why for why in found if why is not None), None)
        return {"why": None if why is None else str(why)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _send(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
