"""Assemble a self-contained HTML page from the files in `assets/` and the data of a run or a sweep.

The page loads nothing: style, script and data are inline, and its content security policy forbids requests.
"""

from __future__ import annotations

import html
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatrain.resilience.atomic_file import write_atomically
from megatrain.tracking.metrics import to_json

RUN_PAGE = ("run.html", "page.css", "page.js", "run_charts.js", "run_strips.js", "run.js")
SWEEP_PAGE = ("sweep.html", "page.css", "sweep.css", "page.js", "sweep.js")


def write_page(assets: tuple[str, ...], data: dict[str, Any], out: Path) -> Path:
    """Write the page made of `assets` (`RUN_PAGE` or `SWEEP_PAGE`) and `data` to `out`, and return `out`.

    `data["name"]` is the page's title. The scripts read `data` as JSON.
    """
    title = html.escape(data["name"])
    page = fill(
        read_asset("page.html"),
        title=title,
        style=join(assets, ".css"),
        body=fill(join(assets, ".html"), title=title),
        data=to_json(data).replace("<", "\\u003c"),  # no text of the run can end the script element
        script=join(assets, ".js"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return out


def fill(template: str, **values: str) -> str:
    """Replace each `{{name}}` in `template` with the value of that name."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def join(assets: tuple[str, ...], suffix: str) -> str:
    """Return the concatenated text of the assets that end in `suffix`, in their order."""
    return "".join(read_asset(name) for name in assets if name.endswith(suffix))


def read_asset(name: str) -> str:
    """Return the text of the package file `assets/<name>`."""
    return files("megatrain.report").joinpath("assets", name).read_text(encoding="utf-8")
