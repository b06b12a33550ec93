"""Cuts clients that stop reading."""

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class SendTimeoutMiddleware:
    """Raises `ClientDisconnect` into an application whose client takes nothing for too long.

    A server blocks `send` while the connection's buffers are full. The application then ends as
    if the client had gone, and frees what it holds for it.

    Args:
        app: The application.
        send_timeout: Seconds that one message may block.
    """

    def __init__(self, app: ASGIApp, send_timeout: float) -> None:
        self._app = app
        self._send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._send_timeout):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        await self._app(scope, receive, send_in_time)
