"""docs/reference/layouts.md lists the refusals of the table."""

from __future__ import annotations

import importlib.util
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "layouts_reference.py"


def test_the_layouts_page_is_current():
    spec = importlib.util.spec_from_file_location("layouts_reference", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.PAGE.read_text(encoding="utf-8")
    assert tool.page(text) == text, "run python tools/layouts_reference.py"
