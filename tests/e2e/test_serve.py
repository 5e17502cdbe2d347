"""`megatrain serve` as a process: what runs at TERM is finished before it ends."""

from __future__ import annotations

import json
import signal

import httpx
from support.serving import LIMIT_S, save_assistant, started


def test_at_term_the_server_finishes_what_runs_and_ends_with_0(tmp_path):
    save_assistant(tmp_path / "toy")
    body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 6, "max_tokens": 100}
    with started(str(tmp_path / "toy"), "serve.max_concurrent=1", f"serve.grace_s={LIMIT_S}") as (process, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=LIMIT_S) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors
    assert events[-1] == "data: [DONE]", "six replies, of which one at a time is computed"
    records = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert [record["event"] for record in records] == ["draining", "request"]
