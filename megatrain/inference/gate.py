"""Admit requests to `/v1` by their headers, before anything of their bodies is read."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from megatrain.inference.api_errors import ApiError
from megatrain.inference.service import Service

CLIENT = "megatrain.client"
"""The scope's key of who asks."""


class Gate:
    """Middleware: who asks under `/v1` has a valid key, and is within the limits per minute if it is a POST."""

    def __init__(self, app: ASGIApp, service: Callable[[], Service]) -> None:
        self.app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            service = self._service()
            try:
                scope[CLIENT] = client_of(scope, service.keys)
                if scope["method"] == "POST":
                    service.admit(scope[CLIENT])
            except ApiError as error:
                service.metrics.count(scope["path"], error.status)
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def client_of(scope: Scope, keys: Sequence[str]) -> str:
    """Return who asks: a hash of the key, or without `keys` the address. Raises `ApiError` 401 without a valid key."""
    if not keys:
        return scope["client"][0] if scope.get("client") else "unknown"
    scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    key = key.strip()
    found = [hmac.compare_digest(key, valid.encode()) for valid in keys]
    if scheme.lower() != b"bearer" or not any(found):
        what = "the API key is not valid" if key else "no API key; send it as the header authorization: Bearer <key>"
        raise ApiError(401, what, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
    return hashlib.sha256(key).hexdigest()[:12]
