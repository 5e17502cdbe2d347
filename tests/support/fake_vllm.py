"""A stand-in for vLLM's server, for tests of `serve.backend=vllm`: python fake_vllm.py RECORD MODE --config FILE ...

It writes its words and options to the file RECORD. MODE: `serve` answers /health until TERM; `loading` never does;
`broken` ends at once with code 3, `short` after the first answer; `deaf` ignores TERM, and has a child.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import yaml

record, mode = Path(sys.argv[1]), sys.argv[2]
options = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
child = subprocess.Popen(["sleep", "600"]).pid if mode == "deaf" else None
content = {"words": sys.argv, "options": options, "environ": dict(os.environ), "pid": os.getpid(), "child": child}
record.with_suffix(".new").write_text(json.dumps(content))
record.with_suffix(".new").rename(record)


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def end(*_):
    record.with_suffix(".term").touch()
    os._exit(0)


signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "deaf" else end)
if mode == "broken":
    sys.exit(3)
if mode == "loading":
    time.sleep(600)
with HTTPServer((options["host"], options["port"]), Health) as server:
    while True:
        server.handle_request()
        if mode == "short":
            sys.exit(3)
