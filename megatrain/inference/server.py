"""Run the serving API: listen, serve until a signal, finish what runs, end."""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn

from megatrain.config import ServeGroup
from megatrain.errors import EXIT_INTERRUPTED, EXIT_OK, ConfigError, EnvironmentFault
from megatrain.inference.app import log, make_app
from megatrain.inference.check_process import ContentChecks
from megatrain.inference.http_protocol import LimitedProtocol
from megatrain.inference.service import ServedModel, Service


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises `ConfigError` for an address that is taken or not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        key = "serve.host" if isinstance(error, socket.gaierror) else "serve.port"
        raise ConfigError(
            f"{key}: cannot listen on {host} port {port} ({error.strerror}); give another, or serve.port=0 for any"
        ) from error
    listener.setblocking(False)
    return listener


def networks(proxies: Sequence[str]) -> list[str]:
    """Return the networks of `serve.trusted_proxies`. Raises `ConfigError` for one that is none."""
    found = []
    for proxy in proxies:
        try:
            found.append(str(ipaddress.ip_network(proxy)))
        except ValueError as error:
            example = "serve.trusted_proxies=[127.0.0.1,10.0.0.0/8]"
            raise ConfigError(f"serve.trusted_proxies: {error}; give addresses or networks: {example}") from error
    return found


class Server(uvicorn.Server):
    """uvicorn, which ends as this program does: not ready at the first signal, and with an exit code of its own."""

    def __init__(
        self,
        served: ServedModel,
        config: ServeGroup,
        keys: Sequence[str],
        checks: ContentChecks,
        announce: Callable[[], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`announce` is called once requests are taken, and `beat` every second while the server is healthy."""
        self.service: Service | None = None
        self._announce, self._beat = announce, beat

        def make_service() -> Service:
            self.service = Service(served, config, keys, checks)
            return self.service

        super().__init__(
            uvicorn.Config(
                make_app(make_service),
                http=LimitedProtocol,
                ws="none",
                access_log=False,
                proxy_headers=bool(config.trusted_proxies),
                forwarded_allow_ips=networks(config.trusted_proxies),
                log_level="warning",
                timeout_graceful_shutdown=max(1, round(config.grace_s)),
                timeout_keep_alive=75,
                server_header=False,
            )
        )

    def serve_until_signal(self, listener: socket.socket) -> int:
        """Serve until TERM or Ctrl-C, and return the exit code.

        The first signal lets requests that run finish, for at most `serve.grace_s`; the second ends at once.

        Raises:
            EnvironmentFault: the server cannot start.
        """
        with suppress(SystemExit):
            self.run(sockets=[listener])
        if self.service is None:
            raise EnvironmentFault("the server cannot start; the lines above say why")
        return EXIT_INTERRUPTED if self.force_exit else EXIT_OK

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started and not self.should_exit:
            self._announce()

    async def on_tick(self, counter: int) -> bool:
        """Do what uvicorn does ten times a second, and beat."""
        if counter % 10 == 0 and self.service is not None and self.service.thread.is_healthy:
            self._beat()
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals; do not raise them again at the end, as uvicorn would."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; at the second signal, at once."""
        if self.should_exit:
            self.force_exit = True
            return
        if self.service is not None:
            self.service.is_draining = True
            log("draining", signal=signal.Signals(sig).name, running=self.service.thread.num_open)
        self.should_exit = True
