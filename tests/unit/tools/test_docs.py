"""The documentation: short lines and table rows, links that resolve, and paths that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
ROOMS = ["megatrain", "kernels", "conf", "slurm", "tests", "tools"]
FENCE = re.compile(r"^\s*(```|~~~)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def lines_outside_code(page: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is not in a fenced block."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            yield number, line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_table_rows_and_lines_of_prose_are_short(page):
    """A row of a table has at most 200 characters, a line of prose 120. A line that is one link may be longer."""
    too_long = [
        f"line {number}: {len(line)} characters: {line[:60]}"
        for number, line in lines_outside_code(page)
        if len(line) > (200 if line.startswith("|") else 120) and not re.fullmatch(r"\s*!?\[[^]]*\]\(\S+\)\S?", line)
    ]
    assert not too_long, "\n".join(too_long)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_and_images_resolve(page):
    text = "\n".join(line for _, line in lines_outside_code(page))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = [
        link
        for link in links
        if not re.match(r"[a-z]+:|#", link) and not (page.parent / link.partition("#")[0]).exists()
    ]
    assert not broken


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name_of)
def test_the_files_that_a_page_names_exist(page):
    """Paths such as `megatrain/parallel/layout.py`; only the changelog may name deleted files."""
    text = page.read_text(encoding="utf-8")
    named = set(
        re.findall(rf"(?<![\w/.-])(?:{'|'.join(ROOMS)}|docs)/[\w/.-]*\w\.(?:py|sh|sbatch|yaml|md|svg|png)\b", text)
    )
    assert not sorted(name for name in named if not (ROOT / name).exists())


def test_the_pages_that_code_names_exist():
    """Paths such as docs/... in a docstring, a comment or a message."""
    missing = []
    for folder in ROOMS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in {".py", ".sh", ".sbatch", ".yaml"}:
                continue
            for name in re.findall(r"(?<![\w/.])docs/[\w/]+\.(?:md|svg|png)", path.read_text(encoding="utf-8")):
                if not (ROOT / name).exists():
                    missing.append(f"{name_of(path)}: {name}")
    assert not missing, "\n".join(missing)


def test_every_room_has_an_api_page():
    rooms = {path.parent.name for path in (ROOT / "megatrain").glob("*/__init__.py")} - {"conf", "slurm"}
    assert {page.stem for page in (ROOT / "docs" / "reference" / "api").glob("*.md")} - {"index"} == rooms
