"""Gives every request an id, and every request a line in the log."""

import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headlong.server.http_errors import CLIENT_CLOSED_REQUEST, error_response, note_error, shorten
from headlong.server.telemetry.logs import REQUEST_ID

REQUEST_ID_HEADER = "X-Request-Id"
MAX_PATH_CHARS = 200
MAX_BODY_CHARS = 2000

# Whoever asks these asks every few seconds.
_PROBES = frozenset({"/health", "/ready", "/metrics", "/status"})
_CLIENTS_OWN = re.compile("[!-~]{1,128}")

_access = logging.getLogger("headlong.access")
_bodies = logging.getLogger("headlong.requests")


class RequestLogMiddleware:
    """Names requests and logs how they ended.

    The id is the client's own ``X-Request-Id`` if that is short and visible ASCII, else a fresh
    one. It is sent back with every response and stands in every line that is logged meanwhile.
    Requests that are turned away are reported by the code of their error.

    Args:
        app: The application inside.
        on_rejected: Told why a POST, or what came without a known key, was turned away.
        log_bodies: Whether the beginning of each body is logged, too.
    """

    def __init__(
        self, app: ASGIApp, on_rejected: Callable[[str], None], *, log_bodies: bool
    ) -> None:
        self._app = app
        self._on_rejected = on_rejected
        self._log_bodies = log_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        # Never reset: the server logs an unexpected error after this returns, and its task ends.
        REQUEST_ID.set(request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status: int | None = None

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        if self._log_bodies:
            receive = _logging(receive)
        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            if status is None:
                note_error(scope, error)
                await error_response(error)(scope, receive, send_named)
            raise
        finally:
            # Without a response nobody was there to get one.
            self._report(scope, status or CLIENT_CLOSED_REQUEST, time.perf_counter() - started)

    def _report(self, scope: Scope, status: int, elapsed_s: float) -> None:
        state, path = scope["state"], _path(scope)
        code = state.get("error_code") if status >= 400 else None
        turned_away = status < 500 or status == 503
        # What has no key is counted whatever it asks for: so does guessing keys show.
        counts = scope["method"] == "POST" or status == 401
        if code is not None and turned_away and counts:
            self._on_rejected(code)
        level = logging.DEBUG if path in _PROBES and status == 200 else logging.INFO
        fields = {
            "method": scope["method"],
            "path": path,
            "status": status,
            "duration_ms": round(elapsed_s * 1000, 1),
            "tenant": state.get("tenant") or None,
            "error": code,
        }
        told = {name: value for name, value in fields.items() if value is not None}
        rest = "".join(f" {name}={told[name]}" for name in ("tenant", "error") if name in told)
        _access.log(
            level,
            "%s %s %d %.1f ms%s",
            *(fields[name] for name in ("method", "path", "status", "duration_ms")),
            rest,
            extra=told,
        )


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
    return given if _CLIENTS_OWN.fullmatch(given) else secrets.token_hex(16)


def _path(scope: Scope) -> str:
    # As it was sent, still quoted: no client can write a line of its own with it.
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return shorten(raw.partition(b"?")[0].decode("ascii", "backslashreplace"), MAX_PATH_CHARS)


def _logging(receive: Receive) -> Receive:
    """Receives the same, and logs the beginning of the body when it is complete."""
    beginning = b""
    num_bytes = 0

    async def logged_receive() -> Message:
        nonlocal beginning, num_bytes
        message = await receive()
        if message["type"] == "http.request":
            part = message.get("body", b"")
            # Four bytes are the most that a character takes.
            beginning += part[: 4 * MAX_BODY_CHARS - len(beginning)]
            num_bytes += len(part)
            if not message.get("more_body", False) and num_bytes:
                text = shorten(beginning.decode("utf-8", "replace"), MAX_BODY_CHARS)
                _bodies.info("body of %d bytes: %s", num_bytes, text, extra={"body": text})
        return message

    return logged_receive
