"""How marked text is shown, with colours and without."""

import pytest

from megatrain.verbs.printer import Printer

GREEN = "\x1b[32myes\x1b[0m"


@pytest.mark.parametrize(
    ("environ", "shown", "said"),
    [
        ({"FORCE_COLOR": "1", "TERM": "xterm"}, GREEN, "in green"),
        ({"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": "1"}, "[[yes]]", "between [[ and ]]"),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, "[[yes]]", "between [[ and ]]"),
        ({}, "[[yes]]", "between [[ and ]]"),
    ],
    ids=["terminal", "NO_COLOR", "dumb", "pipe"],
)
def test_marked_text_is_coloured_where_there_are_colours_and_enclosed_elsewhere(
    monkeypatch, capsys, environ, shown, said
):
    for name in ("FORCE_COLOR", "NO_COLOR", "TERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    printer = Printer()
    printer.marked([("no ", False), ("yes", True)])
    assert capsys.readouterr().out == f"no {shown}\n"
    assert printer.legend("it") == f"it is {said}"
