"""The agent reads whole records, even of a rank that is suspended while it writes one."""

from __future__ import annotations

import os
import struct

from megatrain.resilience import heartbeat
from megatrain.resilience.heartbeat import Heartbeat, Heartbeats


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
