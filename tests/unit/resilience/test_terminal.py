"""The writer that owns a process's terminal: streams that break, block or are missing, its log and its status line."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from megatrain.resilience.terminal import MAX_WAITING, Terminal, show


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        try:
            os.close(end)
        except OSError:  # the test closed it
            continue


def fill(writer):
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"\0" * 4096)
    with suppress(BlockingIOError):  # a pipe that is full may still have room for a few bytes
        while True:
            os.write(writer, b"\0")


def test_output_that_is_all_a_command_is_for_fails_once_and_is_kept_as_lost(pipe):
    reader, writer = pipe
    os.close(reader)
    terminal = Terminal(writer, writer)
    print("a note", file=terminal.stderr)
    assert not terminal.lost, "errors of standard error count for nothing"
    with pytest.raises(BrokenPipeError) as raised:
        print("a result", file=terminal.stdout, flush=True)
    assert terminal.lost is raised.value
    print("the rest", file=terminal.stdout, flush=True)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("broken", ["no reader", "full disk", "closed"])
def test_a_job_that_goes_on_never_sees_a_broken_stream_and_its_log_has_all(background, broken, pipe, tmp_path):
    reader, writer = pipe
    os.close(reader)
    file = os.open("/dev/full", os.O_WRONLY) if broken == "full disk" else os.dup(writer)
    terminal = Terminal(file, file)
    terminal.keep_going(background)
    terminal.log_to(tmp_path / "log")
    if broken == "closed":
        os.close(file)
    for number in range(3):
        print("out", number, file=terminal.stdout)
        print("err", number, "\udcff", file=terminal.stderr)
    terminal.close()
    lines = [line for number in range(3) for line in (f"out {number}", f"err {number} \\udcff")]
    assert (tmp_path / "log").read_text().splitlines() == lines
    if broken != "closed":
        os.close(file)


def test_a_reader_that_does_not_read_blocks_nothing_and_is_told_how_much_it_missed(pipe, tmp_path):
    reader, writer = pipe
    fill(writer)
    os.set_blocking(writer, True)
    terminal = Terminal(writer, writer)
    terminal.keep_going(background=True)
    terminal.log_to(tmp_path / "log")
    began = time.monotonic()
    print(0, file=terminal.stderr)
    while terminal._queue.qsize():  # its thread has begun with the first line, which the pipe does not take
        time.sleep(0.01)
    for number in range(1, MAX_WAITING + 500):
        print(number, file=terminal.stderr)
    terminal.close(0.1)
    assert time.monotonic() - began < 5.0
    assert (tmp_path / "log").read_text().split() == [str(number) for number in range(MAX_WAITING + 500)]
    shown = b""
    while select.select([reader], [], [], 1.0)[0]:
        shown += os.read(reader, 1 << 16)
    lines = shown.lstrip(b"\0").decode().splitlines()
    seen = lines[:-1]
    assert seen == [str(number) for number in range(len(seen))] and len(seen) == MAX_WAITING + 1
    missing = MAX_WAITING + 500 - len(seen)
    assert lines[-1] == (
        f"megatrain: {missing} lines are missing here, because their reader was too slow; {tmp_path / 'log'} has them"
    )


@pytest.mark.parametrize("background", [False, True])
def test_a_stream_that_another_process_made_non_blocking_loses_nothing(background, pipe):
    """As a shell's other programs may do to a terminal that they share with it."""
    reader, writer = pipe
    os.set_blocking(writer, False)
    program = (
        "import sys; from megatrain.resilience.terminal import Terminal; terminal = Terminal.install()\n"
        f"if {background}: terminal.keep_going(background=True)\n"
        "for _ in range(400): print('x' * 1000)\n"
        "sys.stdout.flush(); terminal.close(60)"
    )
    job = subprocess.Popen([sys.executable, "-c", program], stdout=writer)
    os.close(writer)
    count = 0
    while data := os.read(reader, 4096):
        count += len(data)
    assert job.wait() == 0 and count == 400 * 1001


def test_streams_closed_at_the_start_lead_to_nowhere_and_no_file_takes_their_place(tmp_path):
    """A temporary file once became standard input, and a log could become standard output."""
    program = """
import os, sys
from megatrain.resilience.terminal import Terminal
Terminal.install()
with open(sys.argv[1], "w") as file:
    print("lost"), print("lost", file=sys.stderr), os.system("echo lost; echo lost >&2")
    file.write(f"{file.fileno() > 2} {sys.stdin.read()!r}")
"""
    file = tmp_path / "file"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program, str(file)]
    assert subprocess.run(command).returncode == 0
    assert file.read_text() == "True ''"


def test_native_output_goes_to_the_log_and_a_fork_prints_there_alone(tmp_path):
    """Native libraries and child processes would block or die with the terminal."""
    program = """
import os, sys
from pathlib import Path
from megatrain.resilience.terminal import Terminal, say
terminal = Terminal.install()
terminal.keep_going(background=True)
terminal.log_to(Path(sys.argv[1]), redirect=True)
os.write(2, b"native\\n")
say("ours")
if os.fork() == 0:
    say("a fork's")
    terminal.close()
    os._exit(0)
os.wait()
terminal.close()
"""
    log = tmp_path / "log"
    command = [sys.executable, "-W", "ignore", "-c", program, str(log)]  # from 3.12 on Python warns of forks
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "megatrain: ours\n")
    assert log.read_text() == "native\nmegatrain: ours\nmegatrain: a fork's\n"


def test_a_line_is_lost_in_silence_where_nobody_installed_a_terminal(monkeypatch, pipe, capsys):
    reader, writer = pipe
    os.close(reader)
    monkeypatch.setattr(sys, "stderr", os.fdopen(os.dup(writer), "w", buffering=1))
    show("nobody reads this")
    monkeypatch.setattr(sys, "stderr", None)
    show("nor this")
    assert capsys.readouterr().out == ""


LINES = {
    "megatrain: error: no such key": "megatrain: \x1b[31merror:\x1b[0m no such key",
    "megatrain: warning: slow": "megatrain: \x1b[33mwarning:\x1b[0m slow",
    "note: few pieces": "\x1b[2mnote: few pieces\x1b[0m",
    "step 20: held-out loss 3.1250": "\x1b[36mstep 20: held-out loss 3.1250\x1b[0m",
    "saved runs/a in 0.12 s": "\x1b[32msaved runs/a in 0.12 s\x1b[0m",
    "run done in 0:00:12": "\x1b[32mrun done in 0:00:12\x1b[0m",
    "step 20/40  loss 2.5": "step 20/40  loss 2.5",
    "read: error: of a user's text": "read: error: of a user's text",
}


def printed(ends, log, background):
    """Return what the reader at the other end sees of `LINES` on standard error, and of one on standard output."""
    reader, writer = ends
    terminal = Terminal(writer, writer)
    terminal.keep_going(background)
    terminal.log_to(log)
    for line in LINES:
        print(line, file=terminal.stderr)
    print("note: a text that a model wrote", file=terminal.stdout)
    terminal.close()
    found, deadline = b"", time.monotonic() + 60
    while b"that a model wrote" not in found:  # a terminal passes it on in parts
        assert select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0], found
        found += os.read(reader, 1 << 16)
    return found.decode().replace("\r\n", "\n").replace("\r\x1b[K", "").splitlines()


@pytest.mark.parametrize("background", [False, True])
def test_a_terminal_has_colours_and_nothing_else_has(background, pipe, tmp_path, monkeypatch):
    plain = [*LINES, "note: a text that a model wrote"]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert printed(pipe, tmp_path / "log", background) == plain
    ends = pty.openpty()
    assert printed(ends, tmp_path / "log of a terminal", background) == [*LINES.values(), plain[-1]]
    assert (tmp_path / "log of a terminal").read_text().splitlines() == plain
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert printed(ends, tmp_path / "log", background) == plain, name
    for end in ends:
        os.close(end)
