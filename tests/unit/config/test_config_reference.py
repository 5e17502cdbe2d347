"""docs/reference/config.md and cleaning.md match the schema."""

import importlib.util
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "config_reference.py"


def test_the_config_reference_is_current():
    """If this fails, run python tools/config_reference.py."""
    spec = importlib.util.spec_from_file_location("config_reference", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for place, written in tool.PAGES.items():
        assert place.read_text(encoding="utf-8") == written()
