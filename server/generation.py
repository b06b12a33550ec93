"""Runs the prompts of one HTTP request on the engine."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headlong.server.engine.outputs import PositionLogprobs, RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.errors import RequestAbortedError
from headlong.server.fan_in import fan_in
from headlong.server.schemas_common import FinishedBy, StreamOptions, Usage

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step of the engine added to one completion.

    Attributes:
        index: Which prompt's it is.
        finish_reason: Set on the last one of a completion only.
    """

    index: int
    text: str
    logprobs: tuple[PositionLogprobs, ...] | None
    finish_reason: FinishedBy | None
    stop_reason: int | str | None


@dataclass(slots=True)
class Completion:
    """A finished completion."""

    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishedBy = "stop"
    stop_reason: int | str | None = None


class Generation:
    """One HTTP request's work on the engine: each prompt is an engine request of its own.

    Args:
        engine: Runs them.
        kind: Prefix of the id.
        model: The name that the client asked for.
        prompts: Token ids of each.
        params: Sampling parameters of each.
    """

    def __init__(
        self,
        engine: "AsyncEngine",
        *,
        kind: str,
        model: str,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
    ) -> None:
        self.id = f"{kind}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model
        self.with_logprobs = params[0].logprobs is not None
        self._engine = engine
        self._prompts = prompts
        self._params = params
        self._num_prompt_tokens = [len(prompt) for prompt in prompts]
        self._num_completion_tokens = [0] * len(prompts)

    @property
    def num_choices(self) -> int:
        """Number of completions."""
        return len(self._prompts)

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all prompts."""
        prompt = sum(self._num_prompt_tokens)
        completion = sum(self._num_completion_tokens)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
        )

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Runs the prompts; closing the generator aborts what still runs.

        Yields:
            What each step adds, steps that add nothing to see left out.

        Raises:
            HeadlongError: The engine refused a prompt, gave it up, or died.
        """
        sources = [
            self._engine.generate(EngineRequest(f"{self.id}-{index}", prompt, params))
            for index, (prompt, params) in enumerate(zip(self._prompts, self._params, strict=True))
        ]
        async with aclosing(fan_in(sources)) as outputs:
            async for index, output in outputs:
                self._num_completion_tokens[index] = output.num_completion_tokens
                delta = _delta(index, output)
                if delta.text or delta.logprobs or delta.finish_reason:
                    yield delta

    async def completions(self) -> list[Completion]:
        """Runs the prompts to their ends; cancelling aborts what still runs.

        Returns:
            The completion of each prompt, in order.

        Raises:
            HeadlongError: The engine refused a prompt, gave it up, or died.
        """
        texts: list[list[str]] = [[] for _ in self._prompts]
        done = [Completion() for _ in self._prompts]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                completion = done[delta.index]
                texts[delta.index].append(delta.text)
                completion.logprobs.extend(delta.logprobs or ())
                if delta.finish_reason is not None:
                    completion.finish_reason = delta.finish_reason
                    completion.stop_reason = delta.stop_reason
        for completion, pieces in zip(done, texts, strict=True):
            completion.text = "".join(pieces)
        return done


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


def _delta(index: int, output: RequestOutput) -> Delta:
    if output.finish_reason == "abort":
        raise RequestAbortedError(output.error or "the engine aborted the request")
    return Delta(index, output.text, output.logprobs, output.finish_reason, output.stop_reason)
