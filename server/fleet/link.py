"""The way from an ingress to the engines of all replicas, which look like one engine from here."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from transformers import PreTrainedTokenizerBase

from headlong.server.engine.messages import (
    Abort,
    Add,
    Command,
    Event,
    Fault,
    Lost,
    Refused,
    Report,
)
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.status import EngineInfo, EngineStats
from headlong.server.engine_link import EngineLink
from headlong.server.errors import DeadlineExceededError, EngineDeadError, HeadlongError
from headlong.server.fleet.messages import Told, decode_told
from headlong.server.fleet.prompt_pages import page_tokens, request_pages
from headlong.server.fleet.stats import FleetStats

logger = logging.getLogger(__name__)

POLL_S = 1.0
POLL_TIMEOUT_S = 5.0
MAX_ATTEMPTS = 8
NEXT_ATTEMPT_S = 0.5
"""A dead engine's process ends after `ray_replica.LAST_WORDS_S`; then nothing is sent there."""

OVERTIME_S = 5.0
"""An engine minds its requests' deadlines; this late there was none that could."""

_encoder = msgspec.msgpack.Encoder()


class RayLink(EngineLink):
    """Sends each request to a replica and brings its outputs back.

    A replica that is lost ends its own requests and no others. Which replica a request goes to is
    the router's business (`ray_router`), and how many there are is Ray's.

    Args:
        engines: A handle of the deployment of `EngineReplica`.
        info: Of one of them.
        tokenizer: The model's tokenizer.

    Attributes:
        info: What one engine is, with the blocks of all of them.
        one: What one engine is.
    """

    def __init__(
        self,
        engines: DeploymentHandle[Any],
        info: EngineInfo,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.tokenizer = tokenizer
        self._name = uuid.uuid4().hex
        self._engines = engines
        self.info = info
        self.one = info
        self._page_tokens = page_tokens(info)
        self._fleet = FleetStats()
        self._on_event: Callable[[Event], None] | None = None
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._poller: asyncio.Task[None] | None = None

    @property
    def replicas(self) -> dict[str, EngineStats]:
        """The latest stats of each replica that is there, by its id."""
        return dict(self._fleet.replicas)

    async def start(self, on_event: Callable[[Event], None]) -> None:
        """Begin to ask the replicas how they do."""
        self._on_event = on_event
        self._poller = asyncio.create_task(self._poll())

    def send(self, command: Command) -> None:
        """Start a request's stream, or end it."""
        match command:
            case Add(request):
                payload = _encoder.encode(request)
                task = asyncio.create_task(self._run(request, payload))
                self._requests[request.request_id] = task
                task.add_done_callback(lambda _: self._forget(request.request_id, task))
            case Abort(request_id):
                if (running := self._requests.get(request_id)) is not None:
                    running.cancel()
            case _:
                pass

    async def close(self) -> None:
        """End all streams; the replicas are not this ingress's to end."""
        self.kill()
        await asyncio.gather(*self._requests.values(), return_exceptions=True)

    def kill(self) -> None:
        """End all streams, without waiting."""
        for task in (*self._requests.values(), *filter(None, [self._poller])):
            # It may be called when the event loop is gone.
            with suppress(RuntimeError):
                task.cancel()

    def _forget(self, request_id: str, task: asyncio.Task[None]) -> None:
        if self._requests.get(request_id) is task:
            del self._requests[request_id]

    async def _run(self, request: EngineRequest, payload: bytes) -> None:
        """Stream one request to its end, whatever that is."""
        try:
            async with asyncio.timeout(_time_left(request)):
                await self._try_all(request, payload)
        except TimeoutError:
            message = "the request ran out of time before a replica could answer"
            self._lose(request, DeadlineExceededError(message, "timeout"))

    async def _try_all(self, request: EngineRequest, payload: bytes) -> None:
        pages = request_pages(request, self._page_tokens)
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                await asyncio.sleep(NEXT_ATTEMPT_S)
            if await self._attempt(request, payload, pages):
                return
        self._lose(request, EngineDeadError("no replica takes the request"))

    async def _attempt(self, request: EngineRequest, payload: bytes, pages: bytes) -> bool:
        """Stream one request from one replica.

        Returns:
            False if that replica's engine was dead already, and another may take the request.
        """
        age_s = time.monotonic() - request.arrived
        response = cast(
            "DeploymentResponseGenerator[bytes]",
            self._engines.options(stream=True).generate.remote(payload, age_s, pages, self._name),
        )
        try:
            async for message in response:
                told = decode_told(message)
                if _never_began(told):
                    return False
                self._take(told)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayError, RayServeException) as error:
            logger.warning("request %s is lost: %s", request.request_id, _first_line(error))
            self._lose(request, EngineDeadError("the replica that ran the request is gone"))
        except Exception:
            logger.exception("request %s is lost", request.request_id)
            response.cancel()
            message = "the request could not be passed on to a replica"
            self._lose(request, EngineDeadError(message))
        else:
            # Of no effect on one that has its end.
            message = "the replica that ran the request stopped early"
            self._lose(request, EngineDeadError(message))
        return True

    def _lose(self, request: EngineRequest, error: HeadlongError) -> None:
        self._emit(Lost(request.request_id, Fault.of(error)))

    def _take(self, told: Told) -> None:
        match told.event:
            case Report(outputs, stats):
                self._emit(Report(outputs, self._fleet.update(told.replica, stats)))
            case Refused() | Lost():
                self._emit(told.event)
            case _:
                pass

    def _emit(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)

    async def _poll(self) -> None:
        """Ask all replicas how they do, for ever."""
        while True:
            there = await self._ask_all()
            if there is not None:
                for told in there:
                    self._take(told)
                self._fleet.keep(told.replica for told in there)
                self.info = _many_times(self.one, max(len(there), 1))
            # That nothing can be heard of them is no reason to give this ingress up for hung.
            self._emit(Report([], self._fleet.total()))
            await asyncio.sleep(POLL_S)

    async def _ask_all(self) -> list[Told] | None:
        """What all replicas say, or None if they could not be asked."""
        try:
            answers = await self._engines.broadcast("stats", self._name).results_async(
                timeout_s=POLL_TIMEOUT_S, return_exceptions=True
            )
        except TimeoutError:
            logger.warning("replicas did not say in %g s how they do", POLL_TIMEOUT_S)
            return None
        except (RayError, RayServeException) as error:
            logger.warning("no replicas to be asked: %s", _first_line(error))
            return []
        return [decode_told(answer) for answer in answers if isinstance(answer, bytes)]


def _time_left(request: EngineRequest) -> float | None:
    if request.timeout_s is None:
        return None
    return request.arrived + request.timeout_s + OVERTIME_S - time.monotonic()


def _many_times(info: EngineInfo, count: int) -> EngineInfo:
    groups = (replace(each, num_blocks=each.num_blocks * count) for each in info.groups)
    return replace(info, groups=tuple(groups), kv_bytes=info.kv_bytes * count)


def _never_began(told: Told) -> bool:
    return isinstance(told.event, Refused) and told.event.fault.kind == EngineDeadError.__name__


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
