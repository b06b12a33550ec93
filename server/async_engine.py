"""The engine on a thread of its own, seen from the event loop.

event loop   ── add, abort, stop ──▶  command queue   ──▶  engine thread
event loop   ◀── one call a step ───  outputs         ◀──  engine thread
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from headlong.server.engine.describe import describe
from headlong.server.engine.engine import Engine
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.errors import EngineDeadError, HeadlongError, InvalidRequestError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Add:
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = _Add | _Abort | _Stop
_Event = RequestOutput | HeadlongError


class AsyncEngine:
    """Streams completions out of an `Engine`.

    Args:
        engine: Driven by this object's thread alone once started.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[_Event]] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dead = asyncio.Event()
        self._stopping = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion of a request."""
        return self._engine.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to this less one."""
        return self._engine.model.vocab_size

    @property
    def default_sampling(self) -> Mapping[str, float | int]:
        """What the model's generation_config asks for, by SamplingParams field."""
        return self._engine.model.default_sampling

    @property
    def is_alive(self) -> bool:
        """Whether the engine can serve."""
        return self._thread is not None and self._thread.is_alive() and not self._dead.is_set()

    def describe(self) -> list[str]:
        """Lines for the operator: device, head map, memory plan, what a full cache would need."""
        return describe(self._engine)

    async def start(self) -> None:
        """Start the engine thread; the running event loop is the one it reports to."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="headlong-engine", daemon=True)
        self._thread.start()

    async def shutdown(self) -> None:
        """Stop after the current step; requests in progress end with `EngineDeadError`."""
        if self._thread is None:
            return
        self._stopping = True
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join)
        self._fail_streams("the server is shutting down")

    async def wait_dead(self) -> None:
        """Return when the engine has died of an error; the process should end then."""
        await self._dead.wait()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RequestOutput, None]:
        """Stream one request. Closing the generator aborts it.

        Args:
            request: Its id must be unlike that of any request in progress.

        Yields:
            One output a token; the last has a finish reason.

        Raises:
            InvalidRequestError: The request cannot be served, and why.
            EngineDeadError: The engine died, or is stopping.
        """
        request_id = request.request_id
        if not self.is_alive or self._stopping:
            raise EngineDeadError("the engine is not running")
        if request_id in self._streams:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        events: asyncio.Queue[_Event] = asyncio.Queue()
        self._streams[request_id] = events
        self._commands.put(_Add(request))
        finished = False
        try:
            while not finished:
                event = await events.get()
                if isinstance(event, HeadlongError):
                    finished = True
                    raise event
                finished = event.finish_reason is not None
                yield event
        finally:
            del self._streams[request_id]
            if not finished:
                self._commands.put(_Abort(request_id))

    def _run(self) -> None:
        """The engine thread: commands first, then a step, for ever."""
        assert self._loop is not None
        try:
            while self._obey():
                outputs = self._engine.step()
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
        except Exception:
            logger.exception("the engine died")
            self._loop.call_soon_threadsafe(self._die)

    def _obey(self) -> bool:
        """Carry out what was asked, waiting if there is nothing else to do; False to stop."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            match command:
                case _Stop():
                    return False
                case _Abort(request_id):
                    self._engine.abort(request_id)
                case _Add(request):
                    try:
                        self._engine.add_request(request)
                    except HeadlongError as error:
                        assert self._loop is not None
                        self._loop.call_soon_threadsafe(self._send, request.request_id, error)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self._send(output.request_id, output)

    def _send(self, request_id: str, event: _Event) -> None:
        # A stream that was closed meanwhile is gone: its abort is on the way.
        if request_id in self._streams:
            self._streams[request_id].put_nowait(event)

    def _die(self) -> None:
        self._dead.set()
        self._fail_streams("the engine stopped on an unexpected error")

    def _fail_streams(self, message: str) -> None:
        for request_id in list(self._streams):
            self._send(request_id, EngineDeadError(message))
