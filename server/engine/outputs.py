"""What the engine says of a request after a step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token, its text and its natural-log probability."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token of one position and the most probable ones, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """A piece of a prompt that was computed.

    Attributes:
        ended: When the engine was through with its step, in seconds of `time.monotonic`.
        num_tokens: Its size.
        num_steps: Steps that it took: more than one only for the end of a very long prompt, whose
            chunks are told as one.
    """

    ended: float
    num_tokens: int
    num_steps: int = 1


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to one completion of a request.

    The first output of a request has no tokens: it says that the request left the queue.

    Attributes:
        request_id: Whose it is.
        index: Which completion of the request it is, from 0.
        text: New text since the last output. Never part of a UTF-8 character, never part of a
            string that may yet turn out to be a stop string.
        token_ids: New tokens, in order. Text of a token may come with a later output.
        logprobs: One entry for each of `token_ids`, or None if the request asked for none.
        finish_reason: Set on the last output of a request only.
        stop_reason: The stop string or stop token id that ended it, if one did.
        num_prompt_tokens: Length of the prompt.
        num_cached_tokens: Prompt tokens that were found in the prefix cache.
        num_completion_tokens: Tokens generated so far, of this completion.
        error: Why the completion failed, with `finish_reason` "abort".
        error_code: What kind of failure, "request_aborted", "invalid_structure" or
            "deadline_exceeded".
        queued_s: On the first output of a request, seconds from its arrival to its first step.
        prefill_chunks: Chunks of the prompt that were computed since the last output; after a
            preemption also those of the completion.
        prompt_logprobs: If asked for, on one output of completion 0: one entry for each token of
            the prompt but the first, which nothing predicts.
        cache_misses: On the last output, prompt tokens that the prefix cache did not have, by
            reason; they and `num_cached_tokens` make up the prompt.
        kv_bytes_peak: On the last output, most bytes of KV cache that the completion held.
        kv_bytes_full: On the last output, what a cache that keeps everything would have held.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    index: int = 0
    error: str | None = None
    error_code: str | None = None
    queued_s: float | None = None
    prefill_chunks: tuple[PrefillChunk, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
    cache_misses: Mapping[str, int] = field(default_factory=dict)
    kv_bytes_peak: int = 0
    kv_bytes_full: int = 0
