"""One request's outputs, on their way from the engine to its reader."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from headlong.server.engine.outputs import PrefillChunk, RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    HeadlongError,
)
from headlong.server.queue_gate import Ticket
from headlong.server.telemetry.observer import EndedCompletion, EndedRequest, FinishedAs, Observer

MAX_WAITING_OUTPUTS = 64

_CUT: Mapping[type[HeadlongError], FinishedAs] = {
    DeadlineExceededError: "deadline_exceeded",
    DrainingError: "draining",
    EngineDeadError: "engine_dead",
}


@dataclass(slots=True)
class _Completion:
    """How far one completion is; times of `time.monotonic`."""

    first_token: float = 0.0
    last_token: float = 0.0
    num_tokens: int = 0
    reason: FinishedAs | None = None
    ended: float = 0.0

    @property
    def finished(self) -> bool:
        return self.reason is not None

    def record(self) -> EndedCompletion:
        assert self.reason is not None
        return EndedCompletion(
            reason=self.reason,
            num_tokens=self.num_tokens,
            first_token=self.first_token if self.num_tokens else None,
            last_token=self.last_token if self.num_tokens else None,
            ended=self.ended,
        )


class RequestStream:
    """Holds what the engine said until it is read, and tells an observer of it at once.

    At most `MAX_WAITING_OUTPUTS` outputs, and one for each completion, wait for a slow reader;
    those that follow are merged into them. A reader that is merely slow thereby loses nothing and
    gets larger chunks, at the cost of its own completion's size; one that has stopped is cut by
    the timeout on sending.

    Args:
        request: Whose outputs they are.
        ticket: A place of it is given back when the request leaves the queue.
        observer: Told of each stage.
    """

    def __init__(self, request: EngineRequest, ticket: Ticket | None, observer: Observer) -> None:
        self._request = request
        self._ticket = ticket
        self._observer = observer
        self._waiting: deque[RequestOutput] = deque()
        self._error: HeadlongError | None = None
        self._news = asyncio.Event()
        self._started: float | None = None
        self._prefill_chunks: list[PrefillChunk] = []
        self._has_run = False
        self._num_cached_tokens = 0
        self._cache_misses: Mapping[str, int] = {}
        self._completions = [_Completion() for _ in range(request.n)]

    @property
    def is_pending(self) -> bool:
        """Whether the engine owes it something."""
        return self._error is None and not all(each.finished for each in self._completions)

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if not self.is_pending:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()

    def deliver(self, output: RequestOutput) -> None:
        """Take an output from the engine."""
        self._observe(output, time.monotonic())
        self._news.set()
        if len(self._waiting) >= MAX_WAITING_OUTPUTS:
            for place in range(len(self._waiting) - 1, -1, -1):
                if self._waiting[place].index == output.index:
                    self._waiting[place] = merged(self._waiting[place], output)
                    return
        self._waiting.append(output)

    def refuse(self, error: HeadlongError) -> None:
        """End it, for the engine never took it."""
        self._error = error
        self._news.set()

    def fail(self, error: HeadlongError) -> None:
        """End it with an error, after what already waits."""
        if self.is_pending:
            self._error = error
            self._news.set()
            self._finish_all(_CUT.get(type(error), "abort"))

    def close(self) -> bool:
        """Note that nobody reads it any more.

        Returns:
            Whether the engine still works for it.
        """
        self._leave_queue()
        pending = self.is_pending
        if pending:
            self._finish_all("cancelled")
        # The engine took it, unless it ended without any of its completions.
        if all(each.finished for each in self._completions):
            self._observer.on_ended(self._record())
        return pending

    def _observe(self, output: RequestOutput, now: float) -> None:
        arrived = self._request.arrived
        if self._started is None:
            # It hears of a short prompt's start and of its first token in one report.
            self._started = min(now, arrived + (output.queued_s or 0.0))
            self._leave_queue()
            # One that was given up in the queue never started.
            self._has_run = output.queued_s is not None
            if output.queued_s is not None:
                self._observer.on_started(output.queued_s)
        self._prefill_chunks += output.prefill_chunks
        if output.index == 0:
            # The others share what the first one computed.
            self._num_cached_tokens = output.num_cached_tokens
            self._cache_misses = output.cache_misses
        completion = self._completions[output.index]
        if output.token_ids:
            if completion.num_tokens == 0:
                completion.first_token = now
                self._observer.on_first_token(now - arrived, now - self._started)
            else:
                self._observer.on_token(now - completion.last_token)
            completion.last_token = now
            completion.num_tokens = output.num_completion_tokens
        if output.finish_reason is not None:
            late = output.error_code == "deadline_exceeded"
            self._finish(
                completion,
                "deadline_exceeded" if late else output.finish_reason,
                output.num_prompt_tokens,
                now,
            )

    def _finish_all(self, reason: FinishedAs) -> None:
        num_prompt_tokens = len(self._request.prompt_token_ids)
        for completion in self._completions:
            if not completion.finished:
                self._finish(completion, reason, num_prompt_tokens, time.monotonic())

    def _finish(
        self, completion: _Completion, reason: FinishedAs, num_prompt_tokens: int, now: float
    ) -> None:
        completion.reason, completion.ended = reason, now
        count = completion.num_tokens
        between = completion.last_token - completion.first_token
        self._observer.on_finished(
            reason,
            num_prompt_tokens,
            count,
            now - self._request.arrived,
            between / (count - 1) if count > 1 else None,
        )

    def _record(self) -> EndedRequest:
        return EndedRequest(
            request=self._request,
            started=self._started if self._has_run else None,
            prefill_chunks=tuple(self._prefill_chunks),
            num_cached_tokens=self._num_cached_tokens,
            cache_misses=self._cache_misses,
            completions=tuple(each.record() for each in self._completions),
        )

    def _leave_queue(self) -> None:
        if self._ticket is not None:
            self._ticket.give_back_one()
            self._ticket = None


def merged(older: RequestOutput, newer: RequestOutput) -> RequestOutput:
    """Make one output of two that follow each other in one completion."""
    logprobs = newer.logprobs
    if older.logprobs is not None and newer.logprobs is not None:
        logprobs = older.logprobs + newer.logprobs
    return replace(
        newer,
        text=older.text + newer.text,
        token_ids=older.token_ids + newer.token_ids,
        logprobs=older.logprobs if logprobs is None else logprobs,
        queued_s=older.queued_s if newer.queued_s is None else newer.queued_s,
        prefill_chunks=older.prefill_chunks + newer.prefill_chunks,
        prompt_logprobs=newer.prompt_logprobs or older.prompt_logprobs,
    )
