"""Measure `megatrain serve`: throughput and time to first token by number of clients, and 10,000 requests of all kinds.

    python tools/bench/serving.py make bench-model                     # random, of the size of data=toy's model (0.5M)
    python tools/bench/serving.py throughput runs/assistant             # 1, 8 and 32 clients
    python tools/bench/serving.py peer runs/assistant                   # the generator, and transformers'
    python tools/bench/serving.py soak runs/assistant requests=10000    # random lengths, clients that leave, bad bodies
    python tools/bench/serving.py replicas runs/assistant requests=200  # a worker of two is killed; clients try again

The server runs in a process of its own, on one core (OMP_NUM_THREADS=1), and so do the clients. `throughput` asks for
replies of up to 32 tokens, and counts those that came. `soak` fails if a good request fails, and prints the server's
memory as it goes. `peer` compares the generator with transformers' continuous batching, in one process, with the same
weights, prompts and lengths, and without HTTP; serving_compare.py compares the servers.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import psutil

QUESTIONS = [
    "What is the larger of 31 and 58?",
    "Reverse 1 2 3 4.",
    "What comes after 712?",
    "你好，5 后面是几？",
    "Hi",
]
NEW_TOKENS = 32


def make(folder: Path) -> None:
    """Write a random model of 0.5M parameters, with a tokenizer and a chat template."""
    from dataclasses import asdict

    from megatrain.checkpoint.manifest import EngineCounters, Identity, Progress, RunRecord
    from megatrain.checkpoint.store import write
    from megatrain.config import ModelConfig, TokenizerConfig
    from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
    from megatrain.model.init import build_model

    texts = (f"What is number {n}? The answer is {n * 7}, 回答是 {n}。" for n in range(500))
    wanted = TokenizerConfig(kind="byte_level_bpe", vocab_size=334, chat_template="chatml")
    tokenizer = train_byte_level_bpe(texts, wanted)
    config = ModelConfig(
        num_layers=2, num_heads=4, hidden_size=128, ffn_size=384, max_seq_len=512, vocab_size=tokenizer.vocab_size
    )
    folder.mkdir()
    tokenizer.save(folder / "tokenizer")
    weights = {f"model.{name}": value.detach() for name, value in build_model(config, seed=1).named_parameters()}
    record = RunRecord(Progress(0), EngineCounters(), Identity({"model": asdict(config)}))
    write(folder, weights, record, None)


def started(folder: str, *words: str) -> tuple[subprocess.Popen[str], str]:
    """Start a server; return it and its address."""
    command = [sys.executable, "-m", "megatrain", "serve", folder, "serve.port=0", "serve.model_name=bench", *words]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ)
    assert process.stdout is not None
    found = re.search(r"http://[^\s/]+", process.stdout.readline())
    if found is None:
        raise SystemExit("the server did not start; try the same command by hand")
    return process, found.group()


def memory_mib(pid: int) -> float:
    """Return a process's resident memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return int(found.group(1)) / 1024


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def body(number: int, **changes: Any) -> dict[str, Any]:
    """Return the body of a request."""
    message = {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}
    return {"model": "bench", "messages": [message], "max_tokens": NEW_TOKENS, **changes}


def sampled(number: int) -> dict[str, Any]:
    """Return the body of a request for a sampled stream."""
    return body(number, stream=True, stream_options={"include_usage": True}, temperature=1, seed=number)


async def ask(client: httpx.AsyncClient, content: dict[str, Any]) -> tuple[float, float, int]:
    """Stream a reply. Return seconds to the first token and to the end, and its tokens."""
    begin, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=content) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - begin
                tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", tokens)
    if reply.status_code != 200 or not tokens:
        raise SystemExit(f"a reply failed: {reply.status_code}")
    return first, time.perf_counter() - begin, tokens


async def at_once(
    url: str, clients: int, requests: int, content: Callable[[int], dict[str, Any]] = sampled
) -> tuple[float, list[tuple[float, float, int]]]:
    """Let so many clients ask, each again as soon as it has its reply. Return the seconds and what `ask` returned."""
    numbers = iter(range(requests))
    found: list[tuple[float, float, int]] = []

    async def one(client: httpx.AsyncClient) -> None:
        for number in numbers:
            found.append(await ask(client, content(number)))

    async with AsyncExitStack() as stack:
        # made before the clock starts: each reads the certificates of this machine, which takes longer than a reply
        made = [httpx.AsyncClient(base_url=url, timeout=600) for _ in range(clients)]
        for client in made:
            await stack.enter_async_context(client)
        begin = time.perf_counter()
        await asyncio.gather(*(one(client) for client in made))
        return time.perf_counter() - begin, found


def throughput(folder: str, rounds: int) -> None:
    """Print a line for each number of clients; rounds are interleaved, and the median counts."""
    process, url = started(folder, "serve.max_concurrent=32")
    results: dict[int, list[tuple[float, float, float, float, float]]] = {1: [], 8: [], 32: []}
    try:
        asyncio.run(at_once(url, 4, 16))
        for _ in range(rounds):
            for clients in results:
                before = cpu_s(process.pid)
                seconds, found = asyncio.run(at_once(url, clients, 24 if clients == 1 else 8 * clients))
                tokens, firsts = sum(one[2] for one in found), sorted(one[0] for one in found)
                p95 = quantiles(firsts, n=20)[-1]
                used = cpu_s(process.pid) - before
                results[clients].append((tokens / seconds, len(found) / seconds, median(firsts), p95, tokens / used))
    finally:
        process.terminate()
        process.wait()
    print("| clients | tokens/s | requests/s | first token p50 | p95 | tokens per second of the server's CPU |")
    print("| --- | --- | --- | --- | --- | --- |")
    for clients, runs in results.items():
        rate, requests, p50, p95, per_cpu = (median(values) for values in zip(*runs, strict=True))
        shown = f"{p50 * 1000:.0f} ms | {p95 * 1000:.0f} ms | {per_cpu:,.0f}"
        print(f"| {clients} | {rate:,.0f} | {requests:.1f} | {shown} |")


def peer(folder: str, rounds: int) -> None:
    """Print the tokens per second of transformers' continuous batching and of `BatchGenerator`, interleaved."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    from megatrain.config import ExportConfig
    from megatrain.data.chat.template import ChatTemplate
    from megatrain.inference.batch_generator import BatchGenerator
    from megatrain.inference.draw import SamplingSettings
    from megatrain.interop.load_model import load
    from megatrain.verbs.export import export_

    torch.set_num_threads(1)
    loaded = load(Path(folder))
    ours = loaded.build(torch.device("cpu"))
    template = ChatTemplate(loaded.need_tokenizer())
    prompts = [template.encode([{"role": "user", "content": one}], asks=True).ids for one in QUESTIONS]
    with tempfile.TemporaryDirectory() as place:
        export_(ExportConfig(path=folder, out=f"{place}/hf"))
        theirs = AutoModelForCausalLM.from_pretrained(f"{place}/hf").eval()
    blocks = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=512)
    fixed = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings = SamplingSettings(NEW_TOKENS, temperature=0)
    print("| replies at once | BatchGenerator, tokens per CPU second | transformers' generate_batch |")
    print("| --- | --- | --- |")
    for number in (1, 8, 32):
        given = [prompts[at % len(prompts)] for at in range(4 * number)]
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            begin = time.process_time()
            BatchGenerator(ours, number, 512, reuse_prefixes=False).run(given, settings)
            rates["ours"].append(len(given) * NEW_TOKENS / (time.process_time() - begin))
            begin = time.process_time()
            found = theirs.generate_batch(
                inputs=given, generation_config=fixed, continuous_batching_config=blocks, progress_bar=False
            )
            tokens = sum(len(one.generated_tokens) for one in found.values())
            rates["theirs"].append(tokens / (time.process_time() - begin))
        print(f"| {number} | {median(rates['ours']):,.0f} | {median(rates['theirs']):,.0f} |")


BAD = [
    (b"{", 400),
    (b"[" * 50_000, 400),
    (b"\xff\xfe", 400),
    (b" " * (2**20 + 1), 413),
    (b'{"model": "other", "messages": [{"role": "user", "content": "a"}]}', 404),
    (b'{"model": "bench", "messages": []}', 400),
    (b'{"model": "bench", "messages": [{"role": "user", "content": "a"}], "tools": [{}]}', 400),
]


async def soak(url: str, pid: int, requests: int, clients: int) -> dict[str, int]:
    """Send requests of all kinds from many clients; return how many of each there were. Exits if a good one fails."""
    draw, numbers = random.Random(0), iter(range(requests))
    kinds = {"whole": 0, "streamed": 0, "left": 0, "bad": 0}

    async def good(client: httpx.AsyncClient, number: int) -> None:
        tokens = draw.randint(1, NEW_TOKENS)
        reply = await client.post("/v1/chat/completions", json=body(number, max_tokens=tokens, seed=number))
        if reply.status_code != 200 or not 1 <= reply.json()["usage"]["completion_tokens"] <= tokens:
            raise SystemExit(f"request {number} failed: {reply.status_code} {reply.text[:300]}")

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        options = {"stream": draw.random() < 0.5, "max_tokens": NEW_TOKENS, "n": draw.randint(1, 3)}
        with suppress(httpx.TimeoutException):
            await client.post("/v1/chat/completions", json=body(number, **options), timeout=draw.random() * 0.02)

    async def one() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            for number in numbers:
                kind = draw.choices(list(kinds), weights=[5, 2, 2, 1])[0]
                kinds[kind] += 1
                if kind == "whole":
                    await good(client, number)
                elif kind == "streamed":
                    await ask(client, sampled(number))
                elif kind == "left":
                    await leave(client, number)
                else:
                    content, status = draw.choice(BAD)
                    headers = {"content-type": "application/json"}
                    reply = await client.post("/v1/chat/completions", content=content, headers=headers)
                    if reply.status_code != status or "error" not in reply.json():
                        raise SystemExit(f"a bad body got {reply.status_code}, not {status}")
                if number % (requests // 10) == 0:
                    print(f"{number:>6} requests: {memory_mib(pid):.1f} MiB", flush=True)

    await asyncio.gather(*(one() for _ in range(clients)))
    return kinds


async def replicas(url: str, victim: int, requests: int, clients: int) -> int:
    """Kill a worker in the middle of the requests; return how often a client had to send one again."""
    numbers, again = iter(range(requests)), 0

    async def one() -> None:
        nonlocal again
        for number in numbers:
            if number == requests // 3:
                os.kill(victim, signal.SIGKILL)
            for attempt in range(20):
                try:
                    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
                        reply = await client.post("/v1/chat/completions", json=body(number))
                except httpx.TransportError:
                    again += 1
                    await asyncio.sleep(0.05 * attempt)
                    continue
                if reply.status_code != 200:
                    raise SystemExit(f"request {number} failed: {reply.status_code} {reply.text[:300]}")
                break
            else:
                raise SystemExit(f"request {number} was never answered")

    await asyncio.gather(*(one() for _ in range(clients)))
    return again


def kill_a_worker(folder: str, requests: int) -> None:
    """Print what became of the requests while a worker of two was killed."""
    process, url = started(folder, "serve.workers=2", "serve.max_queue=200")
    try:
        children = psutil.Process(process.pid).children()
        workers = [child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        again = asyncio.run(replicas(url, workers[0], requests, 8))
        print(f"{requests} requests answered; a worker was killed, and {again} were sent again")
    finally:
        process.terminate()
        print(f"exit code at TERM: {process.wait()}")


def main() -> None:
    """Run what the command line asks for."""
    what, folder = sys.argv[1:3]
    options = dict(word.split("=") for word in sys.argv[3:])
    if what == "make":
        make(Path(folder))
        return
    if what == "throughput":
        throughput(folder, int(options.get("rounds", 3)))
        return
    if what == "peer":
        peer(folder, int(options.get("rounds", 3)))
        return
    if what == "replicas":
        kill_a_worker(folder, int(options.get("requests", 200)))
        return
    process, url = started(folder, "serve.max_concurrent=16", "serve.max_queue=200")
    try:
        begin = time.perf_counter()
        kinds = asyncio.run(
            soak(url, process.pid, int(options.get("requests", 10_000)), int(options.get("clients", 24)))
        )
        seconds = time.perf_counter() - begin
        print(
            f"{kinds}, no failure of a good one, in {seconds:.0f} s; the server has {memory_mib(process.pid):.1f} MiB"
        )
        time.sleep(1)
        waiting = re.findall(r"^megatrain_replies_(?:running|waiting) \S+", httpx.get(f"{url}/metrics").text, re.M)
        print(f"after the last: {', '.join(waiting)}")
    finally:
        process.terminate()
        print(f"exit code at TERM: {process.wait()}")


if __name__ == "__main__":
    main()
