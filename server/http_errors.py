"""Every error over HTTP in OpenAI's form, bounded, and never with a traceback."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from headlong.server.errors import AuthenticationError, HeadlongError, RequestTimeoutError

CLIENT_CLOSED_REQUEST = 499
CHALLENGES = ('Bearer realm="headlong"', 'Basic realm="headlong", charset="UTF-8"')
"""How to send an API key; with the second one, browsers ask their user for it.

Each is a header of its own: Chromium reads no more than one challenge of a header.
"""

MAX_LISTED_ERRORS = 10
MAX_MESSAGE_CHARS = 2000
MAX_PIECE_CHARS = 150

BODY_ERRORS = (400, 401, 404, 408, 413, 415, 500)
"""Statuses of the endpoints that read a body."""
GENERATION_ERRORS = (*BODY_ERRORS, 429, 503, 504)
"""Statuses of the endpoints that generate text."""

ResponseDocs = dict[int | str, dict[str, Any]]


class ErrorBody(BaseModel):
    """One error, as OpenAI's clients read it."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response that is not a success, and of an error inside a stream."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorBody


def error_docs(*statuses: int) -> ResponseDocs:
    """Documents the errors of a route.

    Args:
        statuses: All that it answers with.

    Returns:
        FastAPI's `responses`.
    """
    return {
        status: {"model": ErrorResponse, "description": HTTPStatus(status).phrase}
        for status in statuses
    }


def install_error_handlers(app: FastAPI) -> None:
    """Makes `app` answer every error in OpenAI's form."""

    async def answer(request: Request, error: Exception) -> Response:
        note_error(request.scope, error)
        return error_response(error)

    async def disconnected(_: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # for logs: nobody reads it

    for kind in (HeadlongError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientDisconnect, disconnected)
    # Starlette raises these again after the response, and the server logs them there.
    app.add_exception_handler(Exception, answer)


def note_error(scope: Scope, error: Exception) -> None:
    """Leaves the error's code, or its type, as ``state.error_code`` for logs and metrics."""
    fault = error_body(error).error
    scope.setdefault("state", {})["error_code"] = fault.code or fault.type


def error_response(error: Exception) -> Response:
    """Answers with an error.

    Args:
        error: Any; one that nobody raised on purpose says no more than that.
    """
    status = 500
    headers: dict[str, str] = {}
    if isinstance(error, HeadlongError):
        status = error.status
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, HTTPException):
        status = error.status_code
        headers = dict(error.headers or {})
    elif isinstance(error, RequestValidationError):
        status = 400
    content = error_body(error).model_dump_json()
    response = Response(content, status, headers, media_type="application/json")
    if isinstance(error, AuthenticationError):
        for challenge in CHALLENGES:
            response.headers.append("WWW-Authenticate", challenge)
    if isinstance(error, RequestTimeoutError):
        # What comes yet belongs to this request.
        response.headers["Connection"] = "close"
    return response


def error_body(error: Exception) -> ErrorResponse:
    """Says of an error what a client may know.

    Args:
        error: Any; one that nobody raised on purpose becomes a plain "internal error".
    """
    param: str | None = None
    code: str | None = None
    kind = "invalid_request_error"
    if isinstance(error, HeadlongError):
        message, kind, param, code = error.message, error.type, error.param, error.code
    elif isinstance(error, RequestValidationError):
        message, param = describe_faults(error.errors(), root="body")
    elif isinstance(error, HTTPException):
        message = error.detail
    else:
        message, kind = "internal error", "internal_error"
    body = ErrorBody(
        message=shorten(message, MAX_MESSAGE_CHARS),
        type=kind,
        param=None if param is None else shorten(param, MAX_PIECE_CHARS),
        code=code,
    )
    return ErrorResponse(error=body)


def shorten(text: str, max_chars: int) -> str:
    """Cuts a text that is too long, and shows that it did."""
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def describe_faults(
    faults: Sequence[Mapping[str, Any]], root: str | None = None
) -> tuple[str, str | None]:
    """Tells what pydantic found wrong, at most ten things of it.

    Args:
        faults: Its errors.
        root: The first piece of every location, if that is no field.

    Returns:
        One line, and the field of the first error.
    """
    shown = faults[:MAX_LISTED_ERRORS]
    fields = [_field(fault["loc"], root) for fault in shown]
    lines: list[str] = []
    for field, fault in zip(fields, shown, strict=True):
        text = shorten(str(fault["msg"]), MAX_PIECE_CHARS)
        lines.append(f"{field}: {text}" if field else text)
    if len(faults) > MAX_LISTED_ERRORS:
        lines.append(f"and {len(faults) - MAX_LISTED_ERRORS} more")
    return "; ".join(lines), fields[0] if fields else None


def _field(pieces: Sequence[int | str], root: str | None) -> str | None:
    if pieces and pieces[0] == root:
        pieces = pieces[1:]
    # The tags of unions are in parentheses. A location may hold keys that the client chose.
    names = [str(piece)[:40] for piece in pieces if not str(piece).startswith("(")]
    return shorten(".".join(names), MAX_PIECE_CHARS) or None
