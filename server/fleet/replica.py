"""One engine as a replica of a Ray Serve deployment."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import msgspec
from ray import serve

from headlong.server.config import ServerConfig
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.messages import Fault, Lost, Ready, Refused, Report
from headlong.server.engine.request import EngineRequest
from headlong.server.errors import EngineDeadError, HeadlongError
from headlong.server.fleet.messages import Told, encode_told
from headlong.server.fleet.prompt_pages import max_pages
from headlong.server.fleet.router import MAX_PAGES
from headlong.server.start_engine import start_engine
from headlong.server.telemetry.logs import configure_logs

logger = logging.getLogger(__name__)

EXIT_CODE = 1
SILENT_S = 30.0
"""An ingress asks for stats every second; one that has not for so long is gone."""
LAST_WORDS_S = 1.0
"""Time for errors on their way to clients, before the process of a dead engine ends."""

_requests: msgspec.msgpack.Decoder[EngineRequest] = msgspec.msgpack.Decoder(EngineRequest)


class EngineReplica:
    """Runs an engine in a process beside it; Ray starts another replica when that one dies.

    Args:
        engine_config: What to load and how.
        config: How it logs, and when it counts as hung.
    """

    # Ray awaits it.
    async def __init__(  # type: ignore[misc]
        self, engine_config: EngineConfig, config: ServerConfig
    ) -> None:
        configure_logs(config)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._engine = await asyncio.to_thread(
            start_engine, engine_config, config, progress_bars=False
        )
        await self._engine.start()
        self._heard: dict[str, float] = {}
        self._watcher = asyncio.create_task(self._end_with_engine())

    async def generate(
        self, request: bytes, age_s: float, pages: bytes, ingress: str
    ) -> AsyncGenerator[bytes, None]:
        """Streams one request; cancelling the call aborts it, and so does its ingress's end.

        Args:
            request: An `EngineRequest` as MessagePack.
            age_s: Seconds since it arrived: machines share no clock.
            pages: Names of its prompt's pages, which the router reads.
            ingress: Who sent it.

        Yields:
            `Told` with the request's outputs, or with why there are none or no more of them.
        """
        arrived = time.monotonic() - age_s
        engine_request = replace(_requests.decode(request), arrived=arrived)
        request_id = engine_request.request_id
        was_alive = self._engine.is_alive
        self._heard[ingress] = time.monotonic()
        try:
            async with aclosing(self._engine.generate(engine_request)) as outputs:
                async for output in outputs:
                    # Ray lets a call go on when nobody is left to read it.
                    if time.monotonic() - self._heard[ingress] > SILENT_S:
                        logger.warning("request %s is nobody's any more", request_id)
                        return
                    yield self._tell(Report([output], self._engine.stats))
        except EngineDeadError as error:
            fault = Fault.of(error)
            # What the engine never had can still be sent to another one.
            yield self._tell((Lost if was_alive else Refused)(request_id, fault))
        except HeadlongError as error:
            yield self._tell(Refused(request_id, Fault.of(error)))

    async def info(self) -> bytes:
        """Says what the engine is, as `Told`."""
        # A number of this machine's is a stranger's on another one.
        return self._tell(Ready(replace(self._engine.info, pid=None)))

    async def stats(self, ingress: str) -> bytes:
        """Says how the engine does, as `Told`, to an ingress that is there."""
        self._heard[ingress] = time.monotonic()
        return self._tell(Report([], self._engine.stats))

    async def record_replica_metadata(self) -> dict[str, int]:
        """Tells Ray, and so the routers, how many pages the cache can hold."""
        return {MAX_PAGES: max_pages(self._engine.info)}

    async def check_health(self) -> None:
        """Fails when the engine is dead or hangs, for Ray to replace the replica.

        Raises:
            EngineDeadError: It is.
        """
        if not self._engine.is_alive:
            raise EngineDeadError("the engine is not running")

    def _tell(self, event: Report | Refused | Lost | Ready) -> bytes:
        return encode_told(Told(self._name, event))

    async def _end_with_engine(self) -> None:
        """Ends the process: Ray hears of that sooner than of a failed check."""
        await self._engine.wait_dead()
        logger.critical("the engine died, and its replica with it")
        await asyncio.sleep(LAST_WORDS_S)
        os._exit(EXIT_CODE)
