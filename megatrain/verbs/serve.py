"""`megatrain serve`: answer requests over HTTP with a trained model. `inference/` has the server."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from megatrain.checkpoint.manifest import manifest_hash
from megatrain.config import ServeConfig
from megatrain.data.chat.template import ChatTemplate
from megatrain.distributed.devices import device_by_name
from megatrain.errors import ConfigError, EnvironmentFault, MegatrainError, how_to_install
from megatrain.interop.load_model import find_model, load
from megatrain.resilience.signals import set_parent_death_signal
from megatrain.resilience.terminal import say
from megatrain.verbs.export import write_folder


def serve(config: ServeConfig) -> int:
    """Serve the model of a run, a checkpoint or a Hugging Face folder, until TERM or Ctrl-C.

    Raises:
        ConfigError: the model has no tokenizer or does not fit the memory, the address cannot be used, a file that a
            key names cannot be read, or vLLM cannot honour a key.
        CheckpointError: there is no intact model.
        EnvironmentFault: the libraries of the server are not installed, its workers die again and again, or vLLM ends.
    """
    try:
        from megatrain.inference.memory import check_memory, free_bytes, stored_model
        from megatrain.inference.server import bind, networks
        from megatrain.inference.vllm_server import check_keys, find_command, run_server, settings
        from megatrain.inference.workers import run_workers
    except ModuleNotFoundError as error:
        raise EnvironmentFault(f"serve needs {error.name}: {how_to_install('serve')}") from error
    group = config.serve
    networks(group.trusted_proxies)
    is_embedded = group.backend == "embedded"
    if not is_embedded:
        check_keys(group)
        if config.device != "auto":
            raise ConfigError(f"device={config.device}: vLLM works on the device that it was built for; leave it out")
    elif (stored := stored_model(Path(config.path), config.step)) is not None:
        device = device_by_name(config.device)
        check_memory(config, stored, device, free_bytes(device))
    command = [] if is_embedded else find_command(group.vllm_command)
    keys = _keys(config)
    with bind(group.host, group.port) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host

        def announce() -> None:
            page = "page: /, " if is_embedded else ""
            print(f"{_name(config)} on http://{shown}:{port} ({page}API: /v1); Ctrl-C ends", flush=True)
            if not keys and not _is_loopback(host):
                say("warning: anybody who reaches this address can use the model; give serve.api_key")

        if not is_embedded:
            options = settings(group, exported(config), host, port, _name(config), keys)
            listener.close()  # vLLM opens the port itself
            return run_server(command, options, group, announce)
        if group.workers == 1:
            return _work(config, listener, announce)
        return run_workers(group.workers, _worker, (config, os.getpid()), listener, group.grace_s, announce)


def _work(
    config: ServeConfig, listener: socket.socket, announce: Callable[[], None], beat: Callable[[], None] = lambda: None
) -> int:
    """Serve in this process."""
    from megatrain.inference.check_process import ContentChecks
    from megatrain.inference.memory import precision_of
    from megatrain.inference.server import Server
    from megatrain.inference.service import ServedModel

    with closing(ContentChecks(config.serve)) as checks:
        loaded = load(Path(config.path), config.step)
        tokenizer = loaded.need_tokenizer()
        template = ChatTemplate(tokenizer) if tokenizer.chat_template() is not None else None
        device = device_by_name(config.device)
        model = loaded.build(device, dtype=precision_of(config.serve, device, bool(loaded.quantized)))
        served = ServedModel(_name(config), model, tokenizer, template, loaded.end_tokens())
        del loaded  # with the weights as they were stored
        server = Server(served, config.serve, _keys(config), checks, announce, beat)
        return server.serve_until_signal(listener)


def _worker(listener: socket.socket, config: ServeConfig, parent: int, alive: Any) -> None:
    """Serve in a process that `run_workers` started."""
    os.setpgid(0, 0)  # Ctrl-C in the terminal is for the parent, which then ends its workers
    if sys.platform == "linux":
        set_parent_death_signal(parent)
    listener.setblocking(False)

    def beat() -> None:
        alive.value = time.monotonic()

    try:
        code = _work(config, listener, beat, beat)
    except MegatrainError as error:
        say(f"error: {error}")
        code = error.exit_code
    sys.exit(code)


def exported(config: ServeConfig) -> Path:
    """Return a Hugging Face folder of the model: the given one, or one that is made of the checkpoint, once.

    Its name has the checkpoint's checksum, so one of an earlier start is taken only if the checkpoint is the same.

    Raises:
        ConfigError: the model writes no text, has no tokenizer, or the folder cannot be written.
        CheckpointError: there is no intact model.
    """
    folder, manifest = find_model(Path(config.path), config.step)
    if manifest is None:
        return folder.resolve()
    above = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    place = above / "exported" if config.serve.export_dir is None else Path(config.serve.export_dir)
    out = place.resolve() / f"{folder.resolve().name}-{manifest_hash(manifest.to_json())[:8]}"
    if not out.exists():
        loaded = load(folder)
        loaded.need_tokenizer()
        say(f"exporting {loaded.describe()} to {out}")
        try:
            write_folder(loaded, out, is_for_chats=True)
        except ConfigError:
            if not out.exists():  # another server that starts at the same time may have made it
                raise
    return out


def _keys(config: ServeConfig) -> list[str]:
    """Return the keys that clients may send. Raises `ConfigError` if their file cannot be read."""
    from megatrain.inference.content_checks import read_lines

    group = config.serve
    keys = [] if group.api_key is None else [group.api_key]
    if group.api_key_file is not None:
        keys += read_lines("serve.api_key_file", Path(group.api_key_file))
    return keys


def _name(config: ServeConfig) -> str:
    """Return the model's name: by default that of a run or an exported folder; a checkpoint has that of its run."""
    path = Path(config.path).resolve()
    inside = path.parent.name == "checkpoints"
    return config.serve.model_name or (path.parent.parent.name if inside else path.name)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
