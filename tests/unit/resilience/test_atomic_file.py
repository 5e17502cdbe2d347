"""What a killed process left half written is removed; what another process still writes is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from megatrain.resilience import atomic_file
from megatrain.resilience.atomic_file import remove_abandoned, temporary_name, write_atomically

DIE = """
import os, sys
from pathlib import Path
from megatrain.resilience.atomic_file import replacing, temporary_name
if sys.argv[2] == "folder":
    made = temporary_name(Path(sys.argv[1]))
    made.mkdir()
    (made / "part").touch()
    os._exit(9)
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    os._exit(9)
"""


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_removed_and_nothing_else(kind, tmp_path):
    target = tmp_path / "a.b.json"
    for name in (".hidden.writing", ".others.with.many.parts.writing"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    own = temporary_name(target)
    own.touch()
    before = left(tmp_path)
    assert subprocess.run([sys.executable, "-c", DIE, str(target), kind], check=False).returncode == 9
    assert len(left(tmp_path)) == 4 and not target.exists()
    remove_abandoned(tmp_path)
    assert left(tmp_path) == before
    write_atomically(target, "whole")
    assert left(tmp_path) == [*before, "a.b.json"]


def test_another_machine_with_the_same_process_number_keeps_its_file_for_a_day(tmp_path, monkeypatch):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    monkeypatch.setattr(os, "getpid", lambda: int(ended.stdout))
    with monkeypatch.context() as there:
        there.setattr(atomic_file, "_machine", lambda: "0123456789ab")
        foreign = temporary_name(tmp_path / "x")
    ours = temporary_name(tmp_path / "x")
    for path in (foreign, ours):
        path.touch()
    remove_abandoned(tmp_path)
    assert left(tmp_path) == [foreign.name]
    os.utime(foreign, (time.time() - 90_000,) * 2)
    remove_abandoned(tmp_path)
    assert left(tmp_path) == []


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    remove_abandoned(tmp_path / "none")


def test_an_error_names_the_file_and_not_its_temporary_one(tmp_path):
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "config.yaml", "x")
    assert caught.value.filename == str(tmp_path / "config.yaml") and caught.value.filename2 is None
    assert ".writing" not in str(caught.value)
