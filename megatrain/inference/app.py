"""The serving API over HTTP: routes, keys, bodies, streams, errors and the log of requests."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import megatrain
from megatrain.inference.api_errors import ApiError, from_validation
from megatrain.inference.api_requests import ChatRequest, CompletionRequest, ErrorBody
from megatrain.inference.api_responses import ChatReply, CompletionReply, ModelList, Writer, event
from megatrain.inference.body_limit import BodyLimit
from megatrain.inference.chat_page import chat_page
from megatrain.inference.gate import CLIENT, Gate
from megatrain.inference.job import Job, Piece
from megatrain.inference.service import Service

_LOG = logging.getLogger("megatrain")
_T = TypeVar("_T")

PING = ": still working\n\n"
"""A comment in a stream that waits, so that no proxy takes the connection for dead."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)
}


def make_app(make_service: Callable[[], Service]) -> FastAPI:
    """Return the application. `make_service` is called in its event loop."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = make_service()
        app.state.service = service
        yield
        service.stop()

    app = FastAPI(title="megatrain", version=megatrain.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_api_route("/v1/models", models, responses=_ERRORS, response_model=ModelList)
    app.add_api_route("/v1/models/{model:path}", one_model, responses=_ERRORS, include_in_schema=False)
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], responses=_replies(ChatReply))
    app.add_api_route("/v1/completions", completions, methods=["POST"], responses=_replies(CompletionReply))
    app.add_api_route("/health", health, responses={503: {}})
    app.add_api_route("/ready", ready, responses={503: {}})
    app.add_api_route("/metrics", metrics, include_in_schema=False)
    app.add_api_route("/", page, include_in_schema=False)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)
    app.add_middleware(BodyLimit, service=lambda: app.state.service)
    app.add_middleware(Gate, service=lambda: app.state.service)  # the last one added is asked first
    return app


async def models(request: Request) -> Any:
    """List the model that this server has."""
    service = _service(request)
    return {"object": "list", "data": [_model(service)]}


async def one_model(request: Request, model: str) -> Any:
    """Describe the model."""
    service = _service(request)
    if model != service.served.name:
        raise ApiError(404, "there is no such model here", param="model", code="model_not_found")
    return _model(service)


async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    return await _reply(request, body)


async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue a text."""
    return await _reply(request, body)


async def health(request: Request) -> Response:
    """Say whether the server works; if not, it should be started again."""
    is_healthy = _service(request).thread.is_healthy
    return JSONResponse({"status": "ok" if is_healthy else "failing"}, 200 if is_healthy else 503)


async def ready(request: Request) -> Response:
    """Say whether the server should be sent requests: it works and does not end. One with a full queue answers 429."""
    service = _service(request)
    is_ready = service.thread.is_healthy and not service.is_draining
    return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)


async def metrics(request: Request) -> Response:
    """Return the counts in Prometheus's text format."""
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def page(request: Request) -> Response:
    """Return the chat page."""
    service = _service(request)
    text, policy = chat_page(service.served.name, service.config.max_new_tokens, service.served.template is not None)
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
    return HTMLResponse(text, headers=headers)


async def _reply(request: Request, body: ChatRequest | CompletionRequest) -> Response:
    service = _service(request)
    client: str = request.scope[CLIENT]
    is_chat = isinstance(body, ChatRequest)
    logprobs = bool(body.logprobs) if is_chat else body.logprobs is not None
    if logprobs and service.checks.of_replies:  # each token is told at once, also those of a word that is held back
        message = "logprobs: not here, since replies are checked before they are shown"
        raise ApiError(400, message, param="logprobs", code="unsupported_value")
    writer = Writer(service.served.name, is_chat, logprobs)
    job = await (service.chat(body) if isinstance(body, ChatRequest) else service.complete(body))
    entry = _Entry(service, request.url.path, client, writer.id, job, bool(body.stream))
    try:
        pieces = job.pieces()
        if body.stream:
            first = await _unless_gone(request, _first(pieces))
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(writer, job, first, pieces, with_usage, entry)
            return _Stream(events, entry)
        whole = await _unless_gone(request, _all(pieces))
        entry.finish(200)
        return JSONResponse(writer.whole(job, whole))
    except ApiError as error:
        entry.finish(error.status)
        raise
    except BaseException:
        entry.finish(500)
        raise


async def _all(pieces: AsyncIterator[Piece | None]) -> list[Piece]:
    return [piece async for piece in pieces if piece is not None]


async def _first(pieces: AsyncIterator[Piece | None]) -> Piece:
    """Return the first piece. Until then nothing is sent, so that what goes wrong can still have a status."""
    while (piece := await anext(pieces)) is None:
        pass
    return piece


async def _events(
    writer: Writer, job: Job, first: Piece, rest: AsyncIterator[Piece | None], with_usage: bool, entry: _Entry
) -> AsyncIterator[str]:
    """Yield the events of a stream, whose first piece is there already."""
    if writer.is_chat:
        for index in range(len(job.replies)):
            yield writer.first(index, with_usage)
    yield writer.piece(first, with_usage)
    try:
        async for piece in rest:
            text = PING if piece is None else writer.piece(piece, with_usage)
            if text:
                yield text
    except ApiError as error:
        entry.status = error.status
        yield event(error.body())
        return
    if with_usage:
        yield writer.usage(job)
    yield "data: [DONE]\n\n"


class _Entry:
    """A request in the log and in the metrics, written once, when it is over."""

    def __init__(self, service: Service, path: str, client: str, id: str, job: Job, is_stream: bool) -> None:
        self.service, self.path, self.client, self.id, self.job, self.is_stream = (
            service, path, client, id, job, is_stream,
        )  # fmt: skip
        self.status = 200
        self._is_written = False

    def finish(self, status: int | None = None) -> None:
        """Free what the job holds, and write it down: what it cost, but nothing of what it said."""
        if self._is_written:
            return
        self._is_written = True
        job, metrics, now = self.job, self.service.metrics, time.monotonic()
        job.close()
        self.service.count(job, self.client)
        status = status or self.status
        metrics.count(self.path, status)
        metrics.duration.observe(now - job.times.start)
        first = None if job.times.first_token is None else job.times.first_token - job.times.start
        if first is not None:
            metrics.first_token.observe(first)
        finishes = [reply.finish or "cancelled" for reply in job.replies]
        for finish in finishes:
            metrics.finished.labels(finish).inc()
        log(
            "request", id=self.id, path=self.path, client=self.client, status=status, stream=self.is_stream,
            prompt_tokens=job.prompt_tokens, completion_tokens=job.completion_tokens, finish=finishes,
            first_token_s=None if first is None else round(first, 4), seconds=round(now - job.times.start, 4),
        )  # fmt: skip


class _Stream(StreamingResponse):
    """A stream of events. Its job is closed however it ends: also if it never begins, as the client has gone."""

    def __init__(self, events: AsyncIterator[str], entry: _Entry) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", "x-request-id": entry.id}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._entry = entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        except OSError:
            self._entry.finish(499)
        except asyncio.CancelledError:
            self._entry.finish(499)
            raise
        finally:
            is_whole = all(reply.finish is not None for reply in self._entry.job.replies)
            self._entry.finish(None if is_whole or self._entry.status != 200 else 499)


async def _unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """Return what `work` returns; stop it once the client has left. Raises `ApiError` 499 then, which nobody reads."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has left")
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _model(service: Service) -> dict[str, Any]:
    served = service.served
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "megatrain"}


def _replies(model: type) -> dict[int | str, dict[str, Any]]:
    one = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # of the events
    stream = {"content": {"text/event-stream": {"schema": one}}}
    return {200: {"model": model, **stream}, **_ERRORS}


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.status < 499 or error.status == 503:  # those of a job are counted with it
        _service(request).metrics.count(request.url.path, error.status)
    if error.status >= 500 and error.__cause__ is not None:
        _LOG.error("request failed: %s", error, exc_info=error.__cause__)
    return error.response()


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _on_api_error(request, from_validation(list(error.errors())))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # of a body that is too large or too slow
        return await _on_api_error(request, error.__cause__)
    words = {400: "the body cannot be read; send JSON in UTF-8", 404: "there is no such address", 405: "wrong method"}
    message = words.get(error.status_code, str(error.detail))
    return await _on_api_error(request, ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _on_defect(request: Request, error: Exception) -> Response:
    _service(request).metrics.count(request.url.path, 500)
    return ApiError(500, "the server failed; its log says why", code="internal_error").response()


def log(kind: str, **values: Any) -> None:
    """Write one line of JSON to standard error."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sys.stderr.write(json.dumps({"time": now, "event": kind, **values}, ensure_ascii=False) + "\n")
    sys.stderr.flush()
