"""Errors of the serving API, in the form that clients of OpenAI's API read."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refused or failed request: the HTTP status, a message for the client, and which field is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """Return the error as JSON values."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": printable(str(self)), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the error as an HTTP response."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def printable(text: str) -> str:
    """Return text without what UTF-8 cannot encode: a client may send half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def from_validation(errors: list[Any]) -> ApiError:
    """Return the error of a body that does not fit its schema, from pydantic's list."""
    # of a value that may have several types, what is wrong with it as that of which it is
    first = next((error for error in errors if not error.get("type", "").endswith("_type")), errors[0])
    parts = [str(part) for part in first.get("loc", ()) if part != "body"]
    place = [part for part in parts if part.isdecimal() or part.isidentifier()]  # the others are names of types
    if first.get("type") == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if not place and first.get("type") == "invalid_key":
        return ApiError(400, "the body has a field whose name is not Unicode text", code="invalid_value")
    if not place:
        return ApiError(400, "give a JSON object as the body, with the header content-type: application/json")
    name = printable(".".join(place))[:200]
    return ApiError(400, f"{name}: {first.get('msg', 'not valid')}", param=name, code="invalid_value")
