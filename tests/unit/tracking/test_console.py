"""The console and the composite tracker."""

import logging
import math
import os
import pty
import re
import subprocess
from contextlib import suppress

import pytest

from megatrain.resilience.terminal import Terminal
from megatrain.tracking import console
from megatrain.tracking.console import Console, clock, short, try_out
from megatrain.tracking.event_words import change, describe, details
from megatrain.tracking.tracker import RunInfo, Trackers, git_commit


@pytest.fixture
def clock_at(monkeypatch):
    moment = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: moment[0])  # type: ignore[attr-defined]
    return moment


def info(tmp_path, **changes):
    return RunInfo(**{"run_name": "demo", "run_dir": tmp_path, "config": {}, "num_parameters": 12345678, **changes})


def test_a_file_gets_plain_lines_at_intervals_of_steps_or_seconds(tmp_path, clock_at, capsys):
    shown = Console(40, every_steps=10, every_s=5.0)
    shown.start(info(tmp_path, resumed_from_step=3))
    for step in range(4, 41):
        clock_at[0] += 2.0 if 25 <= step < 31 else 0.01
        shown.step({"step": step, "loss": 2.5, "tokens_per_s": 12345.0, "mfu": 0.25, "step_time_s": 0.01})
    shown.finish("done")
    text = capsys.readouterr().err
    assert "\x1b" not in text and "\r" not in text
    assert (
        "12.3M parameters" in text
        and "resuming from step 3" in text
        and re.fullmatch(r"run done in 0:00:1\d", text.splitlines()[-3])
    )
    first, other = text.splitlines()[-2:]
    assert first == f"next: megatrain report {tmp_path}"
    assert other.startswith(f"  or: megatrain generate {tmp_path} ")
    assert [int(step) for step in re.findall(r"^step +(\d+)/40", text, re.MULTILINE)] == [4, 14, 24, 27, 30, 40]
    assert "loss 2.5000  12.3k tok/s  mfu 25.0%  eta" in text
    assert "\nstep  4/40  " in text and "\nstep 14/40  " in text, "the figures are in columns"
    assert re.search(r"step 40/40  .* mfu 25\.0%$", text, re.MULTILINE), "no time is left after the last step"


def test_the_next_step_fits_the_text_that_the_run_read(tmp_path, capsys):
    def advice(kind, **split):
        shown = Console(10)
        dataset = {"splits": {"train": {"tokens": 9, **split}}, "config": {"data": {"kind": kind}}}
        shown.start(info(tmp_path, dataset=dataset))
        shown.finish("done")
        return capsys.readouterr().err.splitlines()[-1].partition("  or: ")[2]

    assert advice("files") == f'megatrain generate {tmp_path} prompt="Once upon a time"'
    assert advice("python_stdlib") == advice("code") == f'megatrain generate {tmp_path} prompt="def main("'
    assert advice("chat", loss_hashes=["00"]) == f"megatrain chat {tmp_path}"
    assert advice("files", parts=[{"loss_hashes": ["00"]}]) == f"megatrain chat {tmp_path}"
    scores = info(tmp_path, config={"model": {"output": "score"}}, dataset={"splits": {"train": {"loss_hashes": [1]}}})
    assert try_out("run", scores) == "megatrain evaluate run", "a reward model writes nothing"


def test_a_held_out_loss_is_shown_once_and_says_how_much_was_read(clock_at, capsys):
    """The line of its step and of later ones do not repeat it."""
    shown = Console(100)
    for step in range(1, 5):
        if step == 3:
            shown.event(
                {"kind": "evaluate", "step": 3, "heldout_loss": 3.125, "num_batches": 8, "all_batches": 1080}
                | {"bits_per_byte": 1.5}
            )
        shown.step({"step": step, "loss": 2.5} | ({"heldout_loss": 3.125} if step == 3 else {}))
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "step 3: held-out loss 3.1250, 1.500 bits per byte (first 8 of 1,080 batches)"
    assert [lines[0][:12], lines[2][:12]] == ["step   1/100", "step   3/100"] and len(lines) == 3
    assert "3.1250" not in lines[2] + shown.status({"step": 4, "loss": 2.5})
    whole = {"kind": "evaluate", "step": 3, "heldout_loss": 3.125, "num_batches": 8, "all_batches": 8}
    assert describe(whole) == "step 3: held-out loss 3.1250"


def test_a_file_gets_a_line_now_and_then_while_an_evaluation_lasts(clock_at, capsys):
    shown = Console(100, every_s=10.0)
    shown.step({"step": 1, "loss": 2.5})
    for batch in range(26):
        shown.progress(2, f"evaluating {batch}/26 batches")
        clock_at[0] += 1.0
    shown.event({"kind": "evaluate", "step": 2, "heldout_loss": 3.0})
    for batch in range(10):  # another evaluation, of less than ten seconds
        shown.progress(3, f"evaluating {batch}/10 batches")
        clock_at[0] += 1.0
    assert capsys.readouterr().err.splitlines()[1:] == [
        "step 2: evaluating 10/26 batches",
        "step 2: evaluating 20/26 batches",
        "step 2: held-out loss 3.0000",
    ]


@pytest.fixture
def on_a_terminal(tmp_path, monkeypatch):
    """Return a function that starts a console on a pty; it returns that, and a function that ends it: its output."""
    monkeypatch.setenv("TERM", "xterm")

    def start(steps):
        reader, writer = pty.openpty()
        terminal = Terminal(writer, writer)
        terminal.keep_going(background=True)
        shown = Console(steps, terminal=terminal)
        shown.start(info(tmp_path))

        def ended():
            terminal.close()
            os.close(writer)
            text = b""
            with suppress(OSError):  # a terminal passes the text on in parts; after the last one reading fails
                while part := os.read(reader, 1 << 16):
                    text += part
            os.close(reader)
            return text.decode()

        return shown, ended

    return start


def test_the_bar_shows_an_evaluation_until_it_ends(on_a_terminal):
    shown, ended = on_a_terminal(20)
    shown.step({"step": 7, "loss": 2.25})
    shown.progress(8, "evaluating 40/128 batches")
    assert re.fullmatch(r"step  7/20 ━+─+ evaluating 40/128 batches", shown.bar(79)) and len(shown.bar(79)) == 79
    shown.step({"step": 8, "loss": 2.0})
    assert "loss 2.0000" in shown.bar(79) and "evaluating" not in shown.bar(79)
    shown.progress(8, "writing a checkpoint: 3 s so far")
    assert shown.bar(79).endswith("─ writing a checkpoint: 3 s so far")
    shown.finish("done")
    assert "writing" not in shown.bar(79), "the bar that stays on the terminal shows the last step"
    ended()


def test_the_time_left_follows_recent_steps(clock_at):
    """A slow start and earlier runs no longer count after enough steps."""
    shown = Console(1000)
    clock_at[0] = 100.0
    shown.step({"step": 1, "loss": 1.0, "step_time_s": 60.0})
    assert shown.seconds_left(1) == pytest.approx(999 * 60)
    for step in range(2, 400):
        clock_at[0] += 0.5
        shown.step({"step": step, "loss": 1.0, "step_time_s": 0.5})
    assert shown.seconds_left(399) == pytest.approx(601 * 0.5)


def test_a_terminal_gets_a_bar_with_notes_above_it(on_a_terminal):
    shown, ended = on_a_terminal(20)
    shown.step({"step": 7, "loss": 2.25, "step_time_s": 1.0})
    shown.event({"time": "", "kind": "save", "step": 7, "checkpoint": "runs/a/step_7", "seconds": 0.123456})
    shown.finish("done")
    lines = [line.rpartition("\r\x1b[K")[2] for line in ended().split("\r\n")]
    lines = [re.sub(r"\x1b\[\d+m", "", line) for line in lines]
    assert lines[1] == "saved runs/a/step_7 in 0.12 s"
    assert re.fullmatch(r"step  7/20 ━+─+ loss 2\.2500  eta \S+", lines[2]) and len(lines[2]) == 79
    assert re.fullmatch(r"run done in 0:00:0\d", lines[3]) and lines[4].startswith("next: ")
    assert lines[5].startswith("  or: ") and lines[6:] == [""]


def test_a_terminal_keeps_a_history_of_the_loss_above_the_bar(on_a_terminal):
    shown, ended = on_a_terminal(50)
    for step in range(1, 51):
        shown.step({"step": step, "loss": 2.5} | ({"heldout_loss": 3.0} if step == 12 else {}))
    shown.finish("done")
    lines = [line.rpartition("\r\x1b[K")[2] for line in ended().split("\r\n")]
    kept = [int(found.group(1)) for line in lines if (found := re.match(r"step +(\d+)/50  loss 2.5", line))]
    assert kept == [5, 10, 12, 15, 20, 25, 30, 35, 40, 45], "the bar itself shows the last step"


def test_a_skipped_step_is_marked(tmp_path):
    shown = Console(20)
    assert shown.status({"step": 7, "loss": None, "updated": True}).startswith("no loss, as no token counts")
    assert shown.status({"step": 7, "loss": math.nan}).startswith("no loss, as no token counts")
    assert "loss not finite  skipped" in shown.status({"step": 7, "loss": math.inf, "updated": False})
    part = {"num_batches": 1, "all_batches": 3}
    assert describe({"kind": "evaluate", "step": 7, "heldout_loss": math.nan, "tokens": 0} | part) == (
        "step 7: no held-out token counts (first 1 of 3 batches)"
    )
    assert "loss not finite  skipped" in shown.status({"step": 7, "loss": None, "updated": False})


def test_counts_and_durations_are_short():
    assert [short(n) for n in (0, 999, 1234, 999_600, 45_600_000, 1.75e11, 1.01e12)] == [
        "0", "999", "1.23k", "1M", "45.6M", "175B", "1.01T"
    ]  # fmt: skip
    assert [clock(s) for s in (0, 61, 3661.4, 90061)] == ["0:00:00", "0:01:01", "1:01:01", "1d 1:01:01"]


class Breaks:
    def __init__(self):
        self.calls = []

    def start(self, info):
        self.calls.append("start")

    def step(self, record):
        self.calls.append("step")
        raise OSError("the disk is gone")

    def event(self, event):
        self.calls.append("event")

    def finish(self, status):
        self.calls.append("finish")


def test_a_tracker_that_raises_is_warned_about_once_and_left_out(tmp_path, caplog, capsys):
    broken = Breaks()
    trackers = Trackers([broken, Console(3)])
    with caplog.at_level(logging.WARNING):
        trackers.start(info(tmp_path))
        for step in (1, 2, 3):
            trackers.step({"step": step, "loss": 1.0})
        trackers.finish("done")
    assert broken.calls == ["start", "step", "finish"]
    assert [record.getMessage() for record in caplog.records] == [
        "Breaks failed and is skipped from now on; training goes on (OSError: the disk is gone)"
    ]
    assert "step 3/3" in capsys.readouterr().err


def test_the_commit_of_a_checkout_says_whether_files_were_changed(tmp_path):
    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    assert git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_only_the_beginning_of_a_long_list_is_shown(tmp_path, capsys):
    """A rollback's event lists every window that it skips."""
    Console(20).event({"time": "", "kind": "rollback", "step": 7, "windows": [*range(9)], "skip_range": [8, 16]})
    assert (
        capsys.readouterr().err
        == "rollback at step 7: windows [0, 1, 2, 3, 4, 5, 6, 7, ... 9 in all], skip range [8, 16]\n"
    )


def test_a_stop_is_named_by_its_signal_and_says_how_to_go_on(tmp_path, capfd):
    shown = Console(20)
    shown.start(info(tmp_path))
    shown.event({"time": "", "kind": "signal", "step": 7, "signal": 15})
    shown.finish("stopped")
    text = capfd.readouterr().err
    assert "SIGTERM at step 7: the run saves and ends" in text
    assert describe({"kind": "signal", "step": 7, "signal": 2}).startswith("Ctrl-C (SIGINT) at step 7: ")
    assert re.search(r"run stopped in 0:00:0\d; the same command continues it", text)


def test_the_start_says_how_long_the_run_is_and_a_resume_only_where_it_goes_on(tmp_path, capsys):
    loop = {"steps": 1000, "global_batch_size": 8, "seq_len": 256, "batch_ramp_start": None}
    data = {"splits": {"train": {"tokens": 1_024_000}}}
    shown = Console(1000)
    config = {"train": loop, "launch": {"device": "auto"}}
    shown.start(info(tmp_path, config=config, dataset=data, resumed_from_step=5))
    shown.event({"time": "", "kind": "resume", "step": 5, "host": "n1", "git_commit": "abc"})
    assert capsys.readouterr().err == (
        "run demo: 12.3M parameters, 1 x cpu (no GPU found), 1,000 steps, 2.05M tokens (2 epochs)\n"
        "resuming from step 5\n"
    )
    assert console.length(info(tmp_path, config={"train": loop | {"batch_ramp_start": 2}})) == "1,000 steps"
    mixed = info(tmp_path, config={"train": loop, "data": {"mixture": {"a": 1}}}, dataset=data)
    assert console.length(mixed) == "1,000 steps, 2.05M tokens", "each source has epochs of its own"


def test_the_sources_of_a_mixture_are_named():
    event = {"kind": "evaluate", "step": 5, "heldout_loss": 3.0, "heldout_loss/web": 2.5, "heldout_loss/zh": 4.0}
    assert describe(event) == "step 5: held-out loss 3.0000 (web 2.5000, zh 4.0000)"
    seen = {"web": {"samples": 3, "share": 0.75, "epochs": 0.5}, "zh": {"samples": 1, "share": 0.25, "epochs": 2.25}}
    told = "read of each source: web 75.0% (0.50 epochs), zh 25.0% (2.25 epochs)"
    assert describe({"kind": "mixture", "step": 5, "sources": seen}) == told


def test_values_that_differ_late_are_shown_with_all_digits():
    assert change(3e-5, 2.99999e-5) == "3e-05 → 2.99999e-05" and change(0.1, 0.25) == "0.1 → 0.25"


def test_an_event_is_told_in_plain_words():
    """Without Python's spelling of texts, lists and missing values."""
    began = {"kind": "init_from", "step": 0, "checkpoint": "runs/a/step_9", "left": ["head"]}
    changed = ["model.max_seq_len 64 → 128", "model.dropout null → 0.1"]
    assert describe(began | {"changed": changed}) == (
        "the weights are those of runs/a/step_9; changed: model.max_seq_len 64 → 128, model.dropout null → 0.1; "
        "left out: head"
    )
    aside = {"kind": "set_aside", "step": 4, "checkpoints": ["step_8", "step_6"], "folder": "a", "cut_metrics": None}
    figures = {"seq_len": 64, "documents": 55, "samples": 1470, "cut_share": 0.02, "padding_share": 0.004674}
    told = "packed web: 1,470 samples, 0.47% padding, 2.00% of the documents cut"
    assert describe({"kind": "packing", "step": 0, "packings": {"web": figures}}) == told
    assert describe(aside) == "set aside at step 4: checkpoints [step_8, step_6], folder a"
    assert describe({"kind": "early_stop", "step": 4}) == "early stop at step 4"
    began = {"kind": "resume", "step": 4, "layout": "native dp=2 bf16", "world_size": 2, "device": "cuda", "host": "n1"}
    assert details(began | {"num_parameters": 9}) == "native dp=2 bf16, 2 x cuda on n1"
    assert details(began | {"restarts": 2}) == "native dp=2 bf16, 2 x cuda on n1, restarts 2"
    assert details({"kind": "stop", "step": 4, "status": "failed", "error": "x"}) == "failed, error x"
    assert describe({"kind": "evaluate", "step": 4, "loss": 2.0}) == "step 4: loss 2", "of another program"
    assert change(None, ["a", "b"]) == "null → [a, b]" and change(True, False) == "true → false"


def test_a_reward_is_shown_until_the_next_replies():
    shown = Console(20)
    assert "reward" not in shown.status({"step": 1, "loss": 0.5})
    for record in ({"step": 2, "loss": 0.5, "reward": 0.25}, {"step": 3, "loss": 0.5}):
        assert shown.status(record).startswith("loss 0.5000  reward 0.250")
