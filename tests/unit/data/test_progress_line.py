"""The progress of a stage where there is no terminal."""

from __future__ import annotations

import pytest

from megatrain.data import progress_line
from megatrain.data.progress_line import Meter


@pytest.mark.parametrize(("last", "lines"), [(40, ["(40%)", "(100%)"]), (100, ["(100%)"])])
def test_each_state_is_printed_once(last, lines, monkeypatch, capsys):
    """The end of a stage prints a line, unless the last one was of the same state."""
    moment = [0.0]
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: moment[0])  # type: ignore[attr-defined]
    with Meter("reading", 100) as meter:
        meter.update(10)
        moment[0] = 11.0
        meter.update(last)
        moment[0] = 12.0
        meter.update(100)
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == lines


def test_a_stage_that_fails_leaves_the_last_line_to_the_error(capsys):
    with pytest.raises(OSError), Meter("reading", 100):
        raise OSError("the disk")
    assert capsys.readouterr().err == ""


def test_a_stage_without_progress_prints_its_end(capsys):
    with Meter("reading", 100):
        pass
    assert capsys.readouterr().err == "reading: 0.0 MB, 0.0 MB/s (0%)\n"
