"""Server-sent events."""

import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing, nullcontext

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headlong.server.api.disconnect import cancel_on_disconnect
from headlong.server.api.schemas_common import NamedEvent
from headlong.server.errors import HeadlongError
from headlong.server.http_errors import ResponseDocs, error_body

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
# Unicode's line separators: JSON leaves them as they are, and clients that split a stream by
# lines in Python's sense break an event there.
_SEPARATORS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def encode_event(data: BaseModel) -> bytes:
    r"""Encodes one event.

    Args:
        data: Fields that were never set are left out.

    Returns:
        ``data: {json}\n\n``, in UTF-8, after a line ``event: {name}`` if it has a name.
    """
    text = data.model_dump_json(exclude_unset=True)
    name = f"event: {data.type}\n" if isinstance(data, NamedEvent) else ""
    return f"{name}data: {text.translate(_SEPARATORS)}\n\n".encode()


def event_stream_docs() -> ResponseDocs:
    """Documents, as FastAPI's `responses`, that success may also be a stream."""
    return {
        200: {
            "description": "The completion, or with `stream` its events",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }


class EventStreamResponse(Response):
    """A stream of events that stops its source when the client leaves.

    An error before the first event is an ordinary error response; a later one is an event and
    ends the stream. Other streams end with a mark, unless their events have names.

    Args:
        chunks: The events' data. Closed in any case.
        held: What the stream needs until its end; closed after it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[BaseModel, None],
        held: AbstractContextManager[object] | None = None,
    ) -> None:
        # Proxies must hand each event on at once.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._held = nullcontext() if held is None else held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        with self._held:
            try:
                await cancel_on_disconnect(receive, self._stream(send))
            except ClientDisconnect:
                logger.info("client left %s", scope["path"])

    async def _stream(self, send: Send) -> None:
        started = False
        last = DONE

        async def send_start() -> None:
            status, headers = self.status_code, self.raw_headers
            await send({"type": "http.response.start", "status": status, "headers": headers})

        async with aclosing(self._chunks) as chunks:
            try:
                async for chunk in chunks:
                    if not started:
                        await send_start()
                        started = True
                        if isinstance(chunk, NamedEvent):
                            last = b""
                    await _send_body(send, encode_event(chunk), more=True)
            except ClientDisconnect:
                raise
            except Exception as error:
                if not started:
                    raise
                if not isinstance(error, HeadlongError):
                    logger.exception("unexpected error in a stream")
                last = encode_event(error_body(error))
        await _send_body(send, last, more=False)


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
