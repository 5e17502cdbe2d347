"""HTML pages as a real browser draws them, for the tests of reports."""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH to draw the page with")


def drawn(page, width=1200):
    """Return the page's DOM after a real browser has run its scripts, without the scripts. Its console stays empty."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--window-size={width},1600", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    command.insert(1, "--enable-logging=stderr")
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    return re.sub(r"<script.*?</script>", "", shown.stdout, flags=re.DOTALL)


def measured(page, expression, width=1200):
    """Return the value of a JavaScript expression on the page, drawn `width` px wide (Chromium draws at least 500)."""
    script = f"build();\ndocument.body.dataset.measured = JSON.stringify({expression});</script>"
    copy = page.with_name("measured.html")
    copy.write_text(re.sub(r"build\(\);\s*</script>", lambda _: script, page.read_text()))
    found = re.search(r'data-measured="(.*?)"', drawn(copy, width)).group(1)
    return json.loads(html.unescape(found))


def rows_of(boxes):
    """Return boxes `[left, top, right, bottom]` in rows: those with the same top, from left to right."""
    rows = {}
    for box in sorted(boxes):
        rows.setdefault(round(box[1]), []).append(box)
    return [rows[top] for top in sorted(rows)]


BOX = "(e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; })"
"""A JavaScript function that gives an element's box."""


class References(html.parser.HTMLParser):
    """Collects everything in a page that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
