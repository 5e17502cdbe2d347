"""Assemble a self-contained HTML page from the files in `assets/` and the data of a run, sweep or dataset.

The page loads nothing: style, script and data are inline, and its content security policy forbids requests.
"""

from __future__ import annotations

import html
import os
import re
import sys
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError, cannot_write
from megatrain.resilience.atomic_file import remove_abandoned, write_atomically
from megatrain.tracking.metrics import to_json

RUN_PAGE = (
    *("run.html", "page.css", "sources.css", "scores.css", "lineage.css"),
    *("page.js", "sources.js", "scores.js", "lineage.js", "run_charts.js", "run_strips.js", "run.js"),
)
MODEL_PAGE = (
    *("model.html", "page.css", "sources.css", "scores.css", "lineage.css"),
    *("page.js", "scores.js", "lineage.js", "model.js"),
)
SCORES_PAGE = ("scores.html", "page.css", "sources.css", "scores.css", "page.js", "scores.js", "scores_page.js")
SWEEP_PAGE = ("sweep.html", "page.css", "sweep.css", "page.js", "sweep.js")
DATASET_PAGE = ("dataset.html", "page.css", "dataset.css", "sources.css", "page.js", "sources.js", "dataset.js")

_OWN = re.compile(rb"\s*<!doctype html>.*\xc2\xb7 megatrain</title>", re.DOTALL)
"""How a page begins that `write_page` made, in this version or an earlier one."""


def write_page(assets: tuple[str, ...], data: dict[str, Any], out: Path) -> Path:
    """Write the page made of `assets` (such as `RUN_PAGE`) and `data` to `out`, and return `out`.

    `data["name"]` is the page's title. The scripts read `data` as JSON. The file that a link leads to is replaced, not
    the link; a device, a FIFO and this process's standard output are written to.

    Raises:
        ConfigError: `out` is a file other than a report page, or cannot be written.
        EnvironmentFault: its disk is full or broken.
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
    if is_standard_output(out):
        sys.stdout.write(page)
        return out
    try:
        if out.exists() and not out.is_file():
            out.write_text(page, encoding="utf-8")
        else:
            _refuse_other_file(out)
            target = out.resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(target.parent)
            write_atomically(target, page)
    except OSError as error:
        raise cannot_write(out, error, "out") from error
    return out


def is_standard_output(path: Path) -> bool:
    """Return whether a path, such as /dev/stdout, leads to this process's standard output."""
    with suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(1))
    return False


def _refuse_other_file(out: Path) -> None:
    """Refuse to replace a file that is neither a report page nor empty. Raises ConfigError."""
    if not out.exists():
        return
    with out.open("rb") as file:
        beginning = file.read(8192)
    if beginning and not _OWN.match(beginning):
        raise ConfigError(
            f"out={out} exists and is not a report page of megatrain; give another out, the name of a new file, or "
            f"remove this one"
        )


def fill(template: str, **values: str) -> str:
    """Replace each `{{name}}` in `template` with the value of that name."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def join(assets: tuple[str, ...], suffix: str) -> str:
    """Return the concatenated text of the assets that end in `suffix`, in their order."""
    return "".join(read_asset(name) for name in assets if name.endswith(suffix))


def read_asset(name: str) -> str:
    """Return the text of the package file `assets/<name>`."""
    return files("megatrain.report").joinpath("assets", name).read_text(encoding="utf-8")
