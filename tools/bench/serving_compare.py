"""Compare `megatrain serve` with `transformers serve --continuous-batching` over HTTP, on the same exported model.

    python tools/bench/serving.py make bench-model
    python tools/bench/serving_compare.py bench-model rounds=6 requests=8

Both run at once, each with one thread, and are asked in turn, so that only one of them works at a time; whichever is
first changes from round to round. `requests` are those of each client. Replies are greedy and have 32 tokens: prompts
whose reply ends before are left out, and each of the others is sent once to each server. The ratio is the median of the
rounds' own ratios, with its 95% interval.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from intervals import median_interval
from serving import NEW_TOKENS, at_once, cpu_s, started

CLIENTS = (1, 8, 32)
START_S = 300


def prepare(folder: str, out: Path, number: int) -> list[str]:
    """Write the model as a folder that both servers read; return questions whose greedy replies have all tokens."""
    import torch

    from megatrain.data.chat.template import ChatTemplate
    from megatrain.inference.batch_generator import BatchGenerator
    from megatrain.inference.draw import SamplingSettings
    from megatrain.interop.load_model import load
    from megatrain.verbs.export import write_folder

    torch.set_num_threads(1)
    loaded = load(Path(folder))
    write_folder(loaded, out, is_for_chats=True)
    template = ChatTemplate(loaded.need_tokenizer())
    stops = frozenset([*template.ends(), *loaded.end_tokens()])
    model = loaded.build(torch.device("cpu"))
    generator = BatchGenerator(model, max(CLIENTS), model.config.max_seq_len)
    found: list[str] = []
    for first in range(0, 20 * number, number):
        asked = [
            f"What comes after {n}, and what is the larger of {n % 97} and 50?" for n in range(first, first + number)
        ]
        prompts = [template.encode([{"role": "user", "content": one}], asks=True).ids for one in asked]
        replies = generator.run(prompts, SamplingSettings(NEW_TOKENS, temperature=0, stop_ids=stops))
        found += [one for one, reply in zip(asked, replies, strict=True) if reply.finish == "length"]
        if len(found) >= number:
            return found
    raise SystemExit(f"this model ends nearly all replies before {NEW_TOKENS} tokens; take one of random weights")


@contextlib.contextmanager
def transformers_serve(folder: Path) -> Iterator[tuple[str, int]]:
    """Run transformers' server; yield its address and its process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    batching = ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "256"]
    program = Path(sys.executable).with_name("transformers")
    process = subprocess.Popen(
        [str(program), "serve", str(folder), *batching, "--device", "cpu", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("transformers serve did not start; try the same command by hand")
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def megatrain_serve(folder: Path) -> Iterator[tuple[str, int]]:
    """Run our server; yield its address and its process."""
    process, url = started(str(folder), "device=cpu", f"serve.max_concurrent={max(CLIENTS)}")
    try:
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def measure(url: str, pid: int, model: str, clients: int, questions: list[str]) -> tuple[float, ...]:
    """Return requests and tokens per second, p50 and p95 of seconds to the first token, and tokens per CPU second."""

    def content(number: int) -> dict[str, Any]:
        options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        messages = [{"role": "user", "content": questions[number]}]
        return {"model": model, "messages": messages, "max_tokens": NEW_TOKENS, **options}

    before = cpu_s(pid)
    seconds, found = asyncio.run(at_once(url, clients, len(questions), content))
    tokens = sum(one[2] for one in found)
    if tokens < 0.99 * len(found) * NEW_TOKENS:  # two likeliest tokens may be equal to the last bit
        raise SystemExit(f"{len(found)} replies have {tokens} tokens, not {NEW_TOKENS} each: {model}")
    firsts, used = [one[0] for one in found], cpu_s(pid) - before
    return len(found) / seconds, tokens / seconds, median(firsts), quantiles(firsts, n=20)[-1], tokens / used


def main() -> None:
    """Print a line for each server and number of clients."""
    options = {"rounds": 6, "requests": 8} | {name: int(n) for name, n in (word.split("=") for word in sys.argv[2:])}
    rounds = options["rounds"]
    sizes = {clients: max(24, clients * options["requests"]) for clients in CLIENTS}
    results: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        questions = iter(prepare(sys.argv[1], folder, (rounds + 1) * sum(sizes.values())))
        with megatrain_serve(folder) as ours, transformers_serve(folder) as theirs:
            servers = {"megatrain": (*ours, "bench"), "transformers": (*theirs, str(folder))}
            for number in range(rounds + 1):
                for clients, size in sizes.items():
                    asked = list(islice(questions, size))
                    for name in sorted(servers, reverse=bool(number % 2)):
                        found = measure(*servers[name], clients, asked)
                        if number:  # the first round warms up
                            results.setdefault((name, clients), []).append(found)
    print("| server | clients | requests/s | tokens/s | first token p50 | p95 | tokens per CPU second |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, clients), measured in sorted(results.items(), key=lambda item: (item[0][1], item[0][0])):
        requests, tokens, p50, p95, per_cpu = (median(values) for values in zip(*measured, strict=True))
        shown = f"{p50 * 1000:.0f} ms | {p95 * 1000:.0f} ms | {per_cpu:,.0f}"
        print(f"| {name} | {clients} | {requests:.1f} | {tokens:,.0f} | {shown} |")
    for clients in CLIENTS:
        pairs = zip(results["megatrain", clients], results["transformers", clients], strict=True)
        print(
            f"{clients} clients: megatrain / transformers tokens/s = {median_interval([a[1] / b[1] for a, b in pairs])}"
        )


if __name__ == "__main__":
    main()
