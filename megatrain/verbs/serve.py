"""`megatrain serve`: answer requests over HTTP with a trained model. `inference/` has the server."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from megatrain.config import ServeConfig
from megatrain.data.chat.template import ChatTemplate
from megatrain.distributed.devices import device_by_name
from megatrain.errors import EnvironmentFault, how_to_install
from megatrain.interop.load_model import load
from megatrain.resilience.terminal import say


def serve(config: ServeConfig) -> int:
    """Serve the model of a run, a checkpoint or a Hugging Face folder, until TERM or Ctrl-C.

    Raises:
        ConfigError: the model has no tokenizer, the address cannot be used, or a file that a key names cannot be read.
        CheckpointError: there is no intact model.
        EnvironmentFault: the libraries of the server are not installed.
    """
    try:
        from megatrain.inference.content_checks import content_checks, read_lines
        from megatrain.inference.server import Server, bind
        from megatrain.inference.service import ServedModel
    except ModuleNotFoundError as error:
        raise EnvironmentFault(f"serve needs {error.name}: {how_to_install('serve')}") from error
    group = config.serve
    keys = [] if group.api_key is None else [group.api_key]
    if group.api_key_file is not None:
        keys += read_lines("serve.api_key_file", Path(group.api_key_file))
    checks = content_checks(group)
    listener = bind(group.host, group.port)
    loaded = load(Path(config.path), config.step)
    tokenizer = loaded.need_tokenizer()
    template = ChatTemplate(tokenizer) if tokenizer.chat_template() is not None else None
    model = loaded.build(device_by_name(config.device))
    name = group.model_name or _name(Path(config.path))
    served = ServedModel(name, model, tokenizer, template, loaded.end_tokens())
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    def announce() -> None:
        print(f"{name} on http://{shown}:{port} (page: /, API: /v1); Ctrl-C ends", flush=True)
        if not keys and not _is_loopback(host):
            say("warning: anybody who reaches this address can use the model; give serve.api_key")

    with listener:
        return Server(served, group, keys, checks, announce).serve_until_signal(listener)


def _name(path: Path) -> str:
    """Return the name of a run or an exported folder; a checkpoint has that of its run."""
    path = path.resolve()
    inside = path.parent.name == "checkpoints"
    return path.parent.parent.name if inside else path.name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
