"""Refuse bodies that are too large or too slow before they are in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatrain.inference.api_errors import ApiError
from megatrain.inference.service import Service


class BodyLimit:
    """Middleware: a body has at most `serve.max_body_bytes`, and has arrived after `serve.timeout_s`."""

    def __init__(self, app: ASGIApp, service: Callable[[], Service]) -> None:
        self.app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        config = self._service().config
        limit, deadline = config.max_body_bytes, time.monotonic() + config.timeout_s
        length = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        if length.isdigit() and int(length[:20]) > limit:
            await too_large.response()(scope, receive, send)
            return
        received, is_whole = 0, False

        async def limited() -> Message:
            nonlocal received, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(408, "the body did not arrive in time", code="timeout") from None
            received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received > limit:
                raise too_large
            return message

        await self.app(scope, limited, send)
