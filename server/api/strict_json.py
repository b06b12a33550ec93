"""Request bodies as strict JSON: UTF-8, no NaN or Infinity, bounded nesting."""

from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from headlong.server.errors import InvalidRequestError, UnsupportedMediaTypeError


class StrictJSONRoute(APIRoute):
    """A route whose body is read by `parse_body` and not by Python's lenient `json`.

    A content type other than JSON is refused, which also keeps a web page in a browser from
    sending a request here without a CORS preflight.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns the handler that FastAPI would use, fed with the strictly parsed body."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self.body_field is None:
                return await handler(request)
            _require_json(request.headers.get("content-type", ""))
            body = parse_body(await request.body())
            return await handler(_ParsedRequest(request, body))

        return handle


class _ParsedRequest(Request):
    """A request whose JSON is already known."""

    def __init__(self, request: Request, body: object) -> None:
        super().__init__(request.scope, request.receive)
        self._parsed = body

    async def body(self) -> bytes:
        # FastAPI only asks whether there is one.
        return b"parsed"

    async def json(self) -> Any:
        return self._parsed


def parse_body(body: bytes) -> object:
    """Parses a body.

    Args:
        body: JSON, in UTF-8.

    Raises:
        InvalidRequestError: It is no JSON, is nested too deeply, holds NaN, Infinity, a lone
            surrogate or bytes that are no UTF-8.
    """
    if not body:
        raise InvalidRequestError("the request body is empty, it must be a JSON object")
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"the request body is not valid JSON: {error}") from None


def _require_json(content_type: str) -> None:
    header = Message()
    header["content-type"] = content_type
    subtype = header.get_content_subtype()
    if header.get_content_maintype() != "application" or (
        subtype != "json" and not subtype.endswith("+json")
    ):
        raise UnsupportedMediaTypeError("the Content-Type must be application/json")
