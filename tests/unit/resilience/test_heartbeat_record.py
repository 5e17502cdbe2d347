"""The agent reads whole records, even of a rank that is suspended while it writes one."""

from __future__ import annotations

import os
import signal
import struct

from megatrain.resilience import heartbeat
from megatrain.resilience.heartbeat import Heartbeat, Heartbeats
from megatrain.resilience.signals import StopRequest


class Interrupted:
    """A record's format whose packing stops in the middle, where the bytes are cleared, to let somebody read."""

    def __init__(self, whole: struct.Struct, meanwhile):
        self.whole, self.meanwhile = whole, meanwhile
        self.unpack_from = whole.unpack_from

    def pack_into(self, memory, offset, *numbers):
        memory[offset : offset + self.whole.size] = bytes(self.whole.size)
        self.meanwhile()
        self.whole.pack_into(memory, offset, *numbers)


def test_a_rank_suspended_in_a_write_keeps_its_last_record(monkeypatch):
    records = Heartbeats(2)
    rank = Heartbeat(os.dup(records.file), 1)
    rank.enter("forward", 7)
    seen = []
    monkeypatch.setattr(heartbeat, "_RECORD", Interrupted(heartbeat._RECORD, lambda: seen.append(records.read(1))))
    rank.enter("backward")
    rank.enter("update")
    assert [(beat.step, beat.phase) for beat in seen] == [(7, "forward"), (7, "backward")]
    assert all(beat.age_s < 60 for beat in seen), "cleared bytes would be a heartbeat of the machine's start"
    assert records.read(1).phase == "update"
    assert records.read(0).phase == "start", "the other rank's record is untouched"
    assert sum(records.account(1).seconds.values()) < 60


def test_a_rank_names_the_signal_that_its_agent_got(monkeypatch):
    """The agent forwards Ctrl-C as SIGTERM. Without a signal to the rank itself, nothing is asked of it."""
    records = Heartbeats(2)
    handlers = {}
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.setdefault(number, handler))
    stop = StopRequest()
    stop.listen()
    rank = Heartbeat(os.dup(records.file), 1)
    stop.asked_by = lambda: rank.asked_by
    records.ask(signal.SIGINT)
    assert stop.signal_number == 0 and not stop
    records.ask(signal.SIGTERM)
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert stop.signal_number == signal.SIGINT and stop
    rank.enter("update", 3)
    assert stop.signal_number == signal.SIGINT, "a heartbeat leaves the mark alone"
    records.clear()
    assert stop.signal_number == signal.SIGTERM, "as under another launcher"
