"""Write the table of refused combinations into docs/reference/layouts.md, from megatrain/parallel/rules.py."""

from __future__ import annotations

from pathlib import Path

from megatrain.parallel.rules import REFUSALS

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "layouts.md"
BEGIN, END = "<!-- refusals: written by tools/layouts_reference.py -->\n", "<!-- end of refusals -->"


def page(text: str) -> str:
    """Return the page with an updated table."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    rows = "".join(f"| `{row.name}` | {row.summary} |\n" for row in REFUSALS)
    return f"{head}{BEGIN}| row | what is refused, and why |\n| --- | --- |\n{rows}{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
