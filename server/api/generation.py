"""Runs the prompts of one HTTP request on the engine."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from headlong.server.api.fan_in import fan_in
from headlong.server.api.schemas_common import FinishedBy, StreamOptions, Usage
from headlong.server.api.usage import UsageTally
from headlong.server.engine.outputs import PositionLogprobs, RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import Structure
from headlong.server.errors import (
    DeadlineExceededError,
    HeadlongError,
    InvalidRequestError,
    RequestAbortedError,
)

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine
    from headlong.server.queue_gate import Ticket


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step of the engine added to one completion.

    Attributes:
        index: Which choice it is for: the completions of the first prompt come first.
        text: New text; a token's may come with a later delta.
        token_ids: New tokens.
        logprobs: One entry for each of them, if the request asked for any.
        finish_reason: Set on the last one of a completion only.
        stop_reason: The stop string or token that ended it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] | None
    finish_reason: FinishedBy | None
    stop_reason: int | str | None


class Generation:
    """One HTTP request's work on the engine.

    Args:
        engine: Runs it.
        generation_id: Begins the ids of `requests`.
        model: The name that the client asked for.
        requests: One for each prompt, all with the same `n` and sampling parameters.
        ticket: Their places in the queue.
        cache_report: Tell in the usage why prompt tokens were not cached.
        only_scores: The prompts are wanted and no completion; the engine makes one token, which
            is dropped.
    """

    def __init__(
        self,
        engine: "AsyncEngine",
        *,
        generation_id: str,
        model: str,
        requests: Sequence[EngineRequest],
        ticket: "Ticket | None" = None,
        cache_report: bool = False,
        only_scores: bool = False,
    ) -> None:
        self.id = generation_id
        self.created = int(time.time())
        self.model = model
        self.requests = requests
        self._engine = engine
        self._ticket = ticket
        self._only_scores = only_scores
        self._tally = UsageTally(requests, with_misses=cache_report, only_scores=only_scores)
        self._prompt_logprobs: dict[int, tuple[PositionLogprobs, ...]] = {}
        self._held: dict[int, list[Delta]] = {
            index: []
            for index, request in enumerate(requests)
            if request.params.prompt_logprobs is not None and len(request.prompt_token_ids) > 1
        }

    @property
    def num_choices(self) -> int:
        """Number of completions."""
        return sum(request.n for request in self.requests)

    @property
    def with_logprobs(self) -> bool:
        """Whether the completions come with log probabilities."""
        return self.requests[0].params.logprobs is not None

    @property
    def usage(self) -> Usage:
        """What the completions took so far."""
        return self._tally.usage

    def prompt_index(self, choice: int) -> int:
        """Which of `requests` a choice completes."""
        return choice // self.requests[0].n

    def prompt_logprobs(self, choice: int) -> tuple[PositionLogprobs, ...]:
        """Log probabilities of a choice's prompt, without its first token.

        They are known when `deltas` yields anything of the choice.
        """
        return self._prompt_logprobs.get(self.prompt_index(choice), ())

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Runs the prompts; closing the generator aborts what still runs.

        Yields:
            What each step adds, in the order of each completion; steps that add neither a token
            nor text are left out.

        Raises:
            HeadlongError: The engine refused a prompt, gave a completion up, or died.
        """
        sources = [self._engine.generate(request, self._ticket) for request in self.requests]
        async with aclosing(fan_in(sources)) as outputs:
            async for prompt, output in outputs:
                if output.finish_reason == "abort":
                    raise _failure(output, self.requests[prompt].params.structure)
                self._tally.add(prompt, output)
                for delta in self._release(prompt, output):
                    yield delta

    async def completions(self) -> list[Delta]:
        """Runs the prompts to their ends; cancelling aborts what still runs.

        Returns:
            Each completion as a whole, in the order of the choices.

        Raises:
            HeadlongError: The engine refused a prompt, gave a completion up, or died.
        """
        pieces: list[list[Delta]] = [[] for _ in range(self.num_choices)]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                pieces[delta.index].append(delta)
        return [_joined(each) for each in pieces]

    def _release(self, prompt: int, output: RequestOutput) -> list[Delta]:
        """Returns what may be shown: nothing of a prompt goes before its own log probabilities."""
        held = self._held.get(prompt)
        if held is not None and output.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = output.prompt_logprobs
            del self._held[prompt]
        deltas: list[Delta] = []
        if output.token_ids or output.text or output.finish_reason is not None:
            deltas = [self._delta(prompt, output)]
        if held is None:
            return deltas
        held += deltas
        return [] if prompt in self._held else held

    def _delta(self, prompt: int, output: RequestOutput) -> Delta:
        assert output.finish_reason != "abort"
        delta = Delta(
            index=prompt * self.requests[0].n + output.index,
            text=output.text,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        if not self._only_scores:
            return delta
        reason: FinishedBy | None = None if output.finish_reason is None else "length"
        return replace(
            delta, text="", token_ids=(), logprobs=None, finish_reason=reason, stop_reason=None
        )


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Where a stream reports its usage: in a chunk at its end, or in every chunk."""

    at_end: bool
    in_chunks: bool

    @classmethod
    def of(cls, options: StreamOptions | None) -> "UsageReport":
        """Reads a request's `stream_options`."""
        at_end = options is not None and options.include_usage is True
        in_chunks = at_end and options is not None and options.continuous_usage_stats is True
        return cls(at_end=at_end, in_chunks=in_chunks)

    def fields(self, generation: Generation) -> dict[str, Usage | None]:
        """Returns the `usage` of an ordinary chunk, as keyword arguments.

        OpenAI's chunks carry `usage: null` if the usage follows, and no such field otherwise.
        """
        if self.in_chunks:
            return {"usage": generation.usage}
        return {"usage": None} if self.at_end else {}


def new_id(prefix: str) -> str:
    """Makes an id that no other request has and nobody can guess.

    Args:
        prefix: What it begins with, a separator included.
    """
    return f"{prefix}{secrets.token_hex(12)}"


def _joined(deltas: Sequence[Delta]) -> Delta:
    """Joins all deltas of a completion."""
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(chain.from_iterable(logprobs)) if logprobs else None,
    )


def _failure(output: RequestOutput, structure: Structure | None) -> HeadlongError:
    message = output.error or "the engine aborted the request"
    if output.error_code == DeadlineExceededError.code:
        return DeadlineExceededError(message, "timeout")
    if output.error_code == "invalid_structure":
        param = "response_format" if structure is None else structure.param
        return InvalidRequestError(message, param)
    return RequestAbortedError(message)
