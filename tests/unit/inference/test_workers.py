"""Several workers behind one address: one that is killed is replaced, and all end with their parent's signal."""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest
from support.serving import LIMIT_S, wait_until
from support.tiny_worker import answer, drain, hang_once

from megatrain.errors import EXIT_BAD_CHECKPOINT, EXIT_INTERRUPTED, EnvironmentFault
from megatrain.inference import workers
from megatrain.inference.server import bind
from megatrain.inference.workers import run_workers


def asked(address):
    """The process that answers, or None if it died meanwhile."""
    try:
        with socket.create_connection(address) as connection:
            return int(connection.recv(20) or 0) or None
    except ConnectionError:
        return None


def test_a_killed_worker_is_replaced_and_a_retry_is_answered():
    seen, ready, ended = set(), threading.Event(), threading.Event()

    def use(address):
        try:
            assert ready.wait(LIMIT_S)
            wait_until(lambda: seen.add(asked(address)) or len(seen - {None}) == 2, "both workers answer")
            victim = next(iter(seen - {None}))
            os.kill(victim, signal.SIGKILL)
            before = set(seen)
            wait_until(lambda: seen.add(asked(address)) or seen - before - {None}, "a third worker answers")
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    with bind("127.0.0.1", 0) as listener:
        user = threading.Thread(target=use, args=(listener.getsockname(),), daemon=True)
        user.start()
        try:
            assert run_workers(2, answer, (0,), listener, 1.0, ready.set) == 0
        finally:
            ended.set()
        user.join(LIMIT_S)
    assert len(seen - {None}) == 3
    for pid in seen - {None}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_mistake_ends_all_workers_and_so_do_deaths_without_end(monkeypatch):
    monkeypatch.setattr(workers, "WITHIN_S", 3600)  # however slow the machine is
    with bind("127.0.0.1", 0) as listener:
        assert run_workers(2, answer, (EXIT_BAD_CHECKPOINT,), listener, 1.0, lambda: None) == EXIT_BAD_CHECKPOINT
    with bind("127.0.0.1", 0) as listener, pytest.raises(EnvironmentFault, match="5 workers died"):
        run_workers(1, answer, (1,), listener, 1.0, lambda: None)


def test_while_workers_end_clients_are_refused_and_a_second_signal_ends_at_once():
    ready, refused = threading.Event(), []

    def use(address):
        try:
            assert ready.wait(LIMIT_S)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: is_refused(address), "nobody listens any more")
            refused.append(True)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with bind("127.0.0.1", 0) as listener:
        threading.Thread(target=use, args=(listener.getsockname(),), daemon=True).start()
        assert run_workers(2, drain, (), listener, 3600.0, ready.set) == EXIT_INTERRUPTED
    assert refused


def is_refused(address):
    try:
        socket.create_connection(address).close()
        return False
    except ConnectionRefusedError:
        return True


def test_a_worker_that_lives_but_does_not_work_is_replaced(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(workers, "SILENCE_S", 2.0)
    found = []

    def use(address):
        try:
            with socket.create_connection(address, timeout=LIMIT_S) as connection:
                found.append(connection.recv(20))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with bind("127.0.0.1", 0) as listener:
        threading.Thread(target=use, args=(listener.getsockname(),), daemon=True).start()
        assert run_workers(1, hang_once, (tmp_path / "hung",), listener, 1.0, lambda: None) == 0
    assert int(found[0]) > 0 and "does not work any more" in capfd.readouterr().err
