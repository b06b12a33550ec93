"""An HTTP server that finishes its requests before it ends."""

import asyncio
import logging
import socket
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine

logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """Drains its engine at the first signal, and ends at the second or with its engine.

    While it drains the socket stays open, so that new requests are told to go elsewhere.

    Args:
        config: Its `timeout_graceful_shutdown` is for what is already written to be sent.
        engine: Started by the application.
        shutdown_timeout: Seconds that requests get to finish.

    Attributes:
        engine_died: Whether the engine's death was the end.
    """

    def __init__(
        self, config: uvicorn.Config, engine: "AsyncEngine", shutdown_timeout: float
    ) -> None:
        super().__init__(config)
        self.engine_died = False
        self._engine = engine
        self._shutdown_timeout = shutdown_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drainer: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until a signal or the engine's death, and until the requests have ended."""
        self._loop = asyncio.get_running_loop()
        watcher = asyncio.create_task(self._end_with_engine())
        try:
            await super().serve(sockets)
        finally:
            watcher.cancel()
            if self._drainer is not None:
                self._drainer.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the application, and says where it is to be found."""
        await super().startup(sockets)
        scheme = "https" if self.config.is_ssl else "http"
        for sock in sockets or ():
            host, port = sock.getsockname()[:2]
            shown = f"[{host}]" if sock.family is socket.AF_INET6 else host
            logger.info("Listening on %s://%s:%d", scheme, shown, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal; unlike uvicorn's, it is not raised again at the end."""
        # It arrives between any two instructions.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._obey_signal)

    def _obey_signal(self) -> None:
        if self._drainer is None:
            logger.info("Finishing requests for up to %s s", self._shutdown_timeout)
            self._engine.drain()
            self._drainer = asyncio.create_task(self._drain())
        else:
            logger.info("Ending at once")
            self._engine.end_streams()
            self._engine.kill()
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._shutdown_timeout):
                await self._engine.wait_idle()
        except TimeoutError:
            logger.warning("requests did not finish in %s s and are cut", self._shutdown_timeout)
            self._engine.end_streams()
        self.should_exit = True

    async def _end_with_engine(self) -> None:
        await self._engine.wait_dead()
        self.engine_died = True
        self.should_exit = True
