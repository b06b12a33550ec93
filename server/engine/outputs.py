"""What the engine says of a request after a step."""

from dataclasses import dataclass
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
class RequestOutput:
    """What one step added to one request.

    Attributes:
        request_id: Whose it is.
        text: New text since the last output. Never part of a UTF-8 character, never part of a
            string that may yet turn out to be a stop string.
        token_ids: New tokens, in order. Text of a token may come with a later output.
        logprobs: One entry for each of `token_ids`, or None if the request asked for none.
        finish_reason: Set on the last output of a request only.
        stop_reason: The stop string or stop token id that ended it, if one did.
        num_prompt_tokens: Length of the prompt.
        num_cached_tokens: Prompt tokens that were found in the prefix cache.
        num_completion_tokens: Tokens generated so far.
        error: Why the request failed, with `finish_reason` "abort".
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
    error: str | None = None
