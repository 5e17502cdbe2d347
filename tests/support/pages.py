"""HTML pages as a real browser draws them, for the tests of reports."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH to draw the page with")


def drawn(page):
    """Return the page's DOM after a real browser has run its scripts, without the scripts. Its console stays empty."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--window-size=1200,1600", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    command.insert(1, "--enable-logging=stderr")
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    return re.sub(r"<script.*?</script>", "", shown.stdout, flags=re.DOTALL)


class References(html.parser.HTMLParser):
    """Collects everything in a page that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
