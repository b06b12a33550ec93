"""Cuts clients that do not finish what they began to send."""

import asyncio
from typing import ClassVar

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from headlong.server.errors import RequestTimeoutError


class ReceiveTimeoutMiddleware:
    """Raises `RequestTimeoutError` into an application that waits too long for its body.

    Args:
        app: The application.
        receive_timeout: Seconds until the next piece of a body, while it is incomplete.
    """

    def __init__(self, app: ASGIApp, receive_timeout: float) -> None:
        self._app = app
        self._receive_timeout = receive_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        complete = False

        async def receive_in_time() -> Message:
            nonlocal complete
            # After its body a client has nothing to say but that it leaves.
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(self._receive_timeout):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeoutError(
                    f"no more of the request's body came within {self._receive_timeout:g} s"
                ) from None
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)


class _TimedProtocol(H11Protocol):
    """Closes connections whose next request's headers do not come.

    uvicorn's own timer runs only after a response, and the first byte stops it.
    """

    receive_timeout: ClassVar[float]
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Lets a connection go."""
        self._stop_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Takes what has come, and stops the time when it is a request."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_timer()

    def on_response_complete(self) -> None:
        """Starts the time for the next request, and for what is left of this one."""
        self._start_timer()
        super().on_response_complete()

    def shutdown(self) -> None:
        """Ends the connection after its response, or at once if its request is incomplete."""
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.close()
        else:
            super().shutdown()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._header_timer = self.loop.call_later(self.receive_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def timed_protocol(receive_timeout: float) -> type[H11Protocol]:
    """Makes the protocol for uvicorn.

    Args:
        receive_timeout: Seconds until a request's headers must be complete, from the connection or
            from the response before.
    """

    class Protocol(_TimedProtocol):
        pass

    Protocol.receive_timeout = receive_timeout
    return Protocol
