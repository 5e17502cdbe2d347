"""A server of a small random model in a thread of this process, for the tests of the serving API."""

from __future__ import annotations

import contextlib
import re
import select
import subprocess
import sys
import threading
import time
from dataclasses import asdict

from megatrain.checkpoint.manifest import Identity
from megatrain.checkpoint.store import write
from megatrain.config import ModelConfig, ServeGroup, TokenizerConfig
from megatrain.data.chat.template import ChatTemplate
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.inference.check_process import ContentChecks
from megatrain.inference.server import Server, bind
from megatrain.inference.service import ServedModel
from megatrain.model.init import build_model
from support.records import at

LIMIT_S = 120
"""Longest wait of a test, generous enough for a slow and busy machine."""


def make_assistant(template="chatml", **changes):
    """Return a random model as it is served; it answers at random, and seldom ends a reply itself."""
    texts = [f"What is number {n}? The answer is {n * 7}, 回答是 {n}。" for n in range(300)]
    tokenizer = train_byte_level_bpe(
        iter(texts), TokenizerConfig(kind="byte_level_bpe", vocab_size=300, chat_template=template)
    )
    shape = {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "ffn_size": 48, "max_seq_len": 160, "init_std": 0.3}
    model = build_model(ModelConfig(**{**shape, "vocab_size": tokenizer.vocab_size, **changes}), seed=5).eval()
    chat = None if template is None else ChatTemplate(tokenizer)
    return ServedModel("toy", model, tokenizer, chat, frozenset([tokenizer.end_of_document]))


@contextlib.contextmanager
def running(served, keys=(), **changes):
    """Serve in a thread; yield the server and its address."""
    settings = {"port": 0, "max_concurrent": 4, "max_queue": 8, "max_new_tokens": 100, "timeout_s": LIMIT_S}
    config = ServeGroup(**{**settings, **changes})
    started = threading.Event()
    with contextlib.closing(ContentChecks(config)) as checks, bind(config.host, config.port) as listener:
        server = Server(served, config, keys, checks, started.set)
        thread = threading.Thread(target=server.serve_until_signal, args=(listener,), daemon=True)
        thread.start()
        assert started.wait(LIMIT_S)
        try:
            yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(LIMIT_S)
    assert not thread.is_alive()


def wait_until(condition, what):
    """Wait until a condition holds."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def save_assistant(folder, **changes):
    """Write the model of `make_assistant` as a checkpoint."""
    assistant = make_assistant(**changes)
    folder.mkdir()
    assistant.tokenizer.save(folder / "tokenizer")
    state = {f"model.{name}": value.detach() for name, value in assistant.model.named_parameters()}
    write(folder, state, at(0, identity=Identity({"model": asdict(assistant.model.config)})), None)


@contextlib.contextmanager
def started(*words):
    """Start `megatrain serve` in a process of its own; yield it and its address, once it says so."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megatrain", "serve", *words, "serve.port=0", "device=cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], LIMIT_S)[0], "the server says nothing"
        line = process.stdout.readline()
        assert " on http://" in line, process.communicate(timeout=LIMIT_S)
        yield process, re.search(r"http://\S+", line).group()
    finally:
        process.kill()
        process.wait()
