"""Run vLLM's own OpenAI server on a folder that transformers reads: its settings, its environment, its life.

`serve.*` keys become vLLM's options; those without one are refused. This file knows no checkpoint and no model.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from megatrain.config import ServeGroup
from megatrain.errors import EXIT_INTERRUPTED, EXIT_OK, ConfigError, EnvironmentFault
from megatrain.inference.workers import stop_requests
from megatrain.resilience.signals import set_parent_death_signal
from megatrain.resilience.terminal import say

HONOURED = (
    *("backend", "vllm_command", "vllm_args", "vllm_start_s", "export_dir", "host", "port", "model_name"),
    *("api_key", "api_key_file", "max_concurrent", "max_new_tokens", "grace_s", "prompt_chunk", "reuse_prefixes"),
)
"""Keys of `serve` that mean the same with vLLM."""

_PROXY = "let a proxy in front of it do so"
_CHECKS = "check texts in front of it"
INSTEAD = {
    "workers": "serve.vllm_args=[--data-parallel-size=N] starts several engines",
    "max_context": "serve.vllm_args=[--max-model-len=N] does it",
    "precision": "serve.vllm_args=[--dtype=float32] does it",
    "max_prompt_tokens": "serve.vllm_args=[--max-model-len=N] bounds prompt and reply together",
    "max_queue": _PROXY,
    "max_body_bytes": _PROXY,
    "requests_per_minute": _PROXY,
    "tokens_per_minute": _PROXY,
    "timeout_s": _PROXY,
    "check_prompt": _CHECKS,
    "check_reply": _CHECKS,
    "blocked_words": _CHECKS,
    "hold_back": _CHECKS,
}
"""What works in place of the other keys."""

INSTALL = (
    "install it in an environment of its own (python -m venv /opt/vllm; /opt/vllm/bin/pip install vllm) and give "
    "serve.vllm_command=[/opt/vllm/bin/vllm,serve], or use serve.backend=embedded"
)

_POLL_S = 0.2
_LAST_S = 10.0
"""Seconds, beyond the grace period, until a server that does not end is killed."""


def check_keys(config: ServeGroup) -> None:
    """Raise `ConfigError` for a key that was changed, but that vLLM's server cannot honour."""
    default = ServeGroup()
    for field in fields(ServeGroup):
        value = getattr(config, field.name)
        if field.name not in HONOURED and value != getattr(default, field.name):
            instead = INSTEAD.get(field.name, "leave it out")
            raise ConfigError(
                f"serve.{field.name}={value}: vLLM's server has no such setting; {instead}, or use "
                "serve.backend=embedded"
            )


def find_command(given: Sequence[str]) -> list[str]:
    """Return the words that start vLLM's server: those given, or those of this Python's vLLM.

    Raises:
        ConfigError: there is no such program as `given` begins with.
        EnvironmentFault: nothing is given, and this Python has no vLLM.
    """
    if not given:
        if find_spec("vllm") is None:
            raise EnvironmentFault(f"serve.backend=vllm: this Python has no vLLM; {INSTALL}")
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    program = os.path.expanduser(given[0])
    if shutil.which(program) is None:
        raise ConfigError(f"serve.vllm_command: there is no program {program}; {INSTALL}")
    return [program, *given[1:]]


def settings(config: ServeGroup, folder: Path, host: str, port: int, name: str, keys: Sequence[str]) -> dict[str, Any]:
    """Return vLLM's options, for a file: keys on a command line could be seen by other users of the machine.

    The longest context is that of the folder's config.json.

    Raises ConfigError for a key of clients that vLLM would take for an option.
    """
    if any(key.startswith("-") for key in keys):
        raise ConfigError("serve.api_key: vLLM's server takes no key that begins with a hyphen; give another")
    found: dict[str, Any] = {
        "model": str(folder),
        "served-model-name": [name],
        "host": host,
        "port": port,
        "dtype": "float32",  # as the embedded server computes
        "max-num-seqs": config.max_concurrent,
        "max-num-batched-tokens": config.prompt_chunk + config.max_concurrent,
        "enable-prefix-caching": config.reuse_prefixes,
        "override-generation-config": {"max_new_tokens": config.max_new_tokens},
        "shutdown-timeout": round(config.grace_s),
    }
    return found | ({"api-key": list(keys)} if keys else {})


def run_server(
    command: Sequence[str], options: dict[str, Any], config: ServeGroup, announce: Callable[[], None]
) -> int:
    """Run vLLM's server until TERM or Ctrl-C, and return the exit code; `announce` is called once it takes requests.

    The first signal lets requests that run finish, for at most `serve.grace_s`; the second ends at once. What the
    server prints goes to standard error.

    Raises:
        EnvironmentFault: it ends by itself, or takes no requests within `serve.vllm_start_s`.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        if sys.platform == "linux":
            set_parent_death_signal(parent)

    # no telemetry, and no questions to the hub about a local folder
    environ = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    with TemporaryDirectory(prefix="megatrain-serve-") as place, stop_requests() as requests:  # for this user only
        file = Path(place) / "vllm.yaml"
        file.write_text(yaml.safe_dump(options), encoding="utf-8")
        words = [*command, "--config", str(file), *config.vllm_args]
        process = subprocess.Popen(
            words, stdout=2, env=environ, start_new_session=True, preexec_fn=die_with_parent
        )  # Ctrl-C in the terminal is for this process, which then ends the server
        try:
            if _wait_until_ready(process, _health(options), config.vllm_start_s, requests):
                announce()
            while not requests:
                if process.poll() is not None:
                    raise EnvironmentFault(f"vLLM ended with code {process.returncode}; the lines above say why")
                time.sleep(_POLL_S)
        finally:
            _end(process, config.grace_s, requests)
        return EXIT_INTERRUPTED if len(requests) > 1 else EXIT_OK


def _health(options: dict[str, Any]) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options["host"], options["host"])
    return f"http://{f'[{host}]' if ':' in host else host}:{options['port']}/health"


def _wait_until_ready(process: subprocess.Popen[bytes], health: str, limit_s: float, requests: Sequence[int]) -> bool:
    """Return whether the server takes requests; False if it was asked to end before."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine, whatever HTTP_PROXY says
    deadline = time.monotonic() + limit_s
    while not requests:
        if process.poll() is not None:
            raise EnvironmentFault(
                f"vLLM ended with code {process.returncode} before it took requests; the lines above say why"
            )
        with suppress(urllib.error.URLError, http.client.HTTPException, OSError), opener.open(health, timeout=5):
            return True
        if time.monotonic() > deadline:
            raise EnvironmentFault(
                f"vLLM takes no requests after {limit_s:g} seconds; raise serve.vllm_start_s if it is still loading"
            )
        time.sleep(_POLL_S)
    return False


def _end(process: subprocess.Popen[bytes], grace_s: float, requests: Sequence[int]) -> None:
    """End the server and what it has started."""
    if process.poll() is None:
        process.terminate()
    deadline = time.monotonic() + grace_s + _LAST_S
    while process.poll() is None and time.monotonic() < deadline and len(requests) < 2:
        time.sleep(_POLL_S)
    if process.poll() is None and len(requests) < 2:
        say(f"warning: vLLM did not end within {grace_s + _LAST_S:g} seconds, and was killed")
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
