"""The engine, seen from the event loop.

event loop   ── add, abort, stop ──▶  the engine's loop, on a thread or in a process
event loop   ◀── a report a step ───  the engine's loop
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Literal

from transformers import PreTrainedTokenizerBase

from headlong.server.config import DEFAULT_HANG_TIMEOUT_S, DEFAULT_MAX_NUM_QUEUED_REQS
from headlong.server.engine.messages import (
    Abort,
    Add,
    Event,
    Failed,
    Lost,
    Ready,
    Refused,
    Report,
)
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.status import EngineInfo, EngineStats
from headlong.server.engine_link import EngineLink, EngineThread
from headlong.server.errors import (
    DrainingError,
    EngineDeadError,
    InvalidRequestError,
)
from headlong.server.queue_gate import QueueGate, Ticket
from headlong.server.request_stream import RequestStream
from headlong.server.telemetry.observer import NoObserver, Observer

if TYPE_CHECKING:
    from headlong.server.engine.engine import Engine

logger = logging.getLogger(__name__)

EngineState = Literal["starting", "ready", "draining", "dead"]

HANG_TICKS = 10
IDLE_POLL_S = 0.05


class AsyncEngine:
    """Streams completions out of an engine.

    Args:
        engine: An `Engine` is driven by a thread of its own from `start` on.
        max_num_queued_reqs: Most requests that are being tokenized or wait.
        hang_timeout: Seconds without a step, while requests are there, after which the engine
            counts as dead.
        observer: Told of every step and request.

    Attributes:
        stats: How it did after its latest report.
        state: Whether it takes requests: after its death by an error or by `shutdown` it is "dead".
        observer: Told of every step and request; may be replaced before `start`.
    """

    def __init__(
        self,
        engine: "Engine | EngineLink",
        *,
        max_num_queued_reqs: int = DEFAULT_MAX_NUM_QUEUED_REQS,
        hang_timeout: float = DEFAULT_HANG_TIMEOUT_S,
        observer: Observer | None = None,
    ) -> None:
        self._link = engine if isinstance(engine, EngineLink) else EngineThread(engine)
        self.stats = EngineStats()
        self.state: EngineState = "starting"
        self.observer: Observer = NoObserver() if observer is None else observer
        self._gate = QueueGate(max_num_queued_reqs)
        self._streams: dict[str, RequestStream] = {}
        self._hang_timeout = hang_timeout
        self._reported = False
        self._watch: asyncio.Task[None] | None = None
        self._died = asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        """What the engine is; of several replicas, what there is of it now."""
        return self._link.info

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._link.tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion of a request."""
        return self.info.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to this less one."""
        return self.info.vocab_size

    @property
    def default_sampling(self) -> Mapping[str, float | int]:
        """What the model's generation_config asks for, by SamplingParams field."""
        return self.info.default_sampling

    @property
    def is_alive(self) -> bool:
        """Whether the engine works on requests, even if it takes no new ones."""
        return self.state in {"ready", "draining"}

    @property
    def is_idle(self) -> bool:
        """Whether there is no request, not even one that is being tokenized."""
        return not self._streams and self._gate.num_queued == 0

    def describe(self) -> list[str]:
        """Lines for the operator: device, head map, memory plan, what a full cache would need."""
        return list(self.info.lines)

    async def start(self) -> None:
        """Let the engine run; the running event loop is the one it reports to."""
        self.state = "ready"
        await self._link.start(self._take)
        self._watch = asyncio.create_task(self._watch_progress())

    async def shutdown(self) -> None:
        """Stop after the current step; requests in progress end with `DrainingError`."""
        if self._watch is not None:
            self._watch.cancel()
        self.end_streams()
        was_alive, self.state = self.is_alive, "dead"
        if was_alive:
            await self._link.close()

    def kill(self) -> None:
        """End the engine at once, without its streams; possible without an event loop."""
        self.state = "dead"
        self._link.kill()

    def drain(self) -> None:
        """Take no new requests, and finish those that there are."""
        if self.state == "ready":
            self.state = "draining"

    async def wait_idle(self) -> None:
        """Return when no request is left."""
        while not self.is_idle:
            await asyncio.sleep(IDLE_POLL_S)

    def end_streams(self) -> None:
        """End all requests with `DrainingError`."""
        for stream in self._streams.values():
            stream.fail(DrainingError("the server is shutting down"))

    async def wait_dead(self) -> None:
        """Return when the engine has died of an error; the process should end then."""
        await self._died.wait()

    def admit(self, count: int) -> Ticket:
        """Take places in the queue, before any work is done for a request.

        Args:
            count: Engine requests that will be made.

        Returns:
            To be handed to `generate`, and released in any case.

        Raises:
            QueueFullError: As many wait as may.
            InvalidRequestError: No more than so many ever may.
            DrainingError: The server is shutting down.
            EngineDeadError: The engine died.
        """
        self._require_alive()
        if self.state == "draining":
            raise DrainingError("the server is shutting down")
        return self._gate.enter(count)

    async def generate(
        self, request: EngineRequest, ticket: Ticket | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream one request. Closing the generator aborts it.

        Args:
            request: Its id must be unlike that of any request in progress.
            ticket: One place of it is given back when the request leaves the queue, or ends.

        Yields:
            Outputs of all its completions, each in order. The first one of a request has no
            tokens, the last one of each completion has a finish reason.

        Raises:
            InvalidRequestError: The request cannot be served, and why.
            EngineDeadError: The engine died.
            DrainingError: The server is shutting down.
        """
        self._require_alive()
        if ticket is None and self.state == "draining":
            raise DrainingError("the server is shutting down")
        request_id = request.request_id
        if request_id in self._streams:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        stream = self._streams[request_id] = RequestStream(request, ticket, self.observer)
        try:
            self._send_request(request)
            async for output in stream:
                yield output
        finally:
            del self._streams[request_id]
            if stream.close():
                self._link.send(Abort(request_id))

    def _require_alive(self) -> None:
        if not self.is_alive:
            raise EngineDeadError("the engine is not running")

    def _send_request(self, request: EngineRequest) -> None:
        try:
            self._link.send(Add(request))
        except (UnicodeEncodeError, OverflowError) as error:
            raise InvalidRequestError(f"the request cannot be passed on: {error}") from error

    def _take(self, event: Event) -> None:
        """Take what the engine says, in the event loop."""
        if not self.is_alive:
            return
        self._reported = True
        match event:
            case Report(outputs, stats):
                self.stats = stats
                self.observer.on_step(stats)
                for output in outputs:
                    # A stream that was closed meanwhile is gone: its abort is on the way.
                    if (stream := self._streams.get(output.request_id)) is not None:
                        stream.deliver(output)
            case Refused(request_id, fault):
                if (stream := self._streams.get(request_id)) is not None:
                    stream.refuse(fault.error())
            case Lost(request_id, fault):
                if (stream := self._streams.get(request_id)) is not None:
                    stream.fail(fault.error())
            case Failed(fault):
                self._die(fault.message)
            case Ready():
                pass

    async def _watch_progress(self) -> None:
        """Find the engine dead when requests are there and reports stay out.

        Ticks are counted, not seconds: while this process is held up, so are the reports.
        """
        num_silent = 0
        while self.is_alive:
            self._reported = False
            await asyncio.sleep(self._hang_timeout / HANG_TICKS)
            pending = any(stream.is_pending for stream in self._streams.values())
            num_silent = num_silent + 1 if pending and not self._reported else 0
            # The first tick may have begun before the request came.
            if num_silent > HANG_TICKS:
                self._die(f"the engine made no step in {self._hang_timeout:g} seconds")

    def _die(self, message: str) -> None:
        logger.critical("%s; %d requests are lost", message, len(self._streams))
        self.state = "dead"
        for stream in self._streams.values():
            stream.fail(EngineDeadError(message))
        self._link.kill()
        self._died.set()
