"""Refuses bodies over a limit before anything parses them."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headlong.server.errors import RequestTooLargeError

BASE_BYTES = 4 << 20
BYTES_PER_TOKEN = 16


def default_max_body_bytes(max_model_len: int) -> int:
    """Returns how large bodies may be, unless the operator says so.

    Parsing a body holds the interpreter's lock, so that all streams wait for it.

    Args:
        max_model_len: The model's context, in tokens.
    """
    return BASE_BYTES + BYTES_PER_TOKEN * max_model_len


class BodyLimitMiddleware:
    """Counts the bytes of a body as they arrive, whatever its Content-Length claims.

    Starlette's own limiter answers in plain text where a Content-Length is declared, and clients
    of this API read errors as JSON.

    Args:
        app: The application inside.
        max_body_bytes: Most bytes of a body.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application with a `receive` that raises `RequestTooLargeError`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        # A declared length can only refuse early; what arrives is counted all the same.
        too_large = declared.isdecimal() and int(declared[:20]) > self._max_body_bytes
        num_received_bytes = 0

        async def limited_receive() -> Message:
            nonlocal num_received_bytes
            if not too_large:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                num_received_bytes += len(message.get("body", b""))
                if num_received_bytes <= self._max_body_bytes:
                    return message
            raise RequestTooLargeError(
                f"the request body is over the limit of {self._max_body_bytes} bytes"
            )

        await self._app(scope, limited_receive, send)
