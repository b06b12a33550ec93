"""Log probabilities in the shapes of the two endpoints."""

from collections.abc import Sequence

from headlong.server.engine.outputs import PositionLogprobs, TokenLogprob
from headlong.server.schemas_chat import ChatLogprobs, ChatTokenLogprob, TokenAlternative
from headlong.server.schemas_completions import CompletionLogprobs

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def completion_logprobs(
    positions: Sequence[PositionLogprobs], text_offset: int
) -> CompletionLogprobs:
    """Shapes the log probabilities of a text completion.

    The chosen token's entry is always among `top_logprobs`, with the same number. Tokens with
    equal text share one entry there: the chosen one's, or the most probable one's.

    Args:
        positions: One entry for each token.
        text_offset: Characters of tokens before these.
    """
    tokens: list[str] = []
    top: list[dict[str, float]] = []
    offsets: list[int] = []
    for position in positions:
        # Worst first, so that the better of two equal texts stays.
        best = [*reversed(position.top), position.chosen]
        top.append({token.text: _finite(token.logprob) for token in best})
        tokens.append(position.chosen.text)
        offsets.append(text_offset)
        text_offset += len(position.chosen.text)
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[_finite(position.chosen.logprob) for position in positions],
        top_logprobs=top,
        text_offset=offsets,
    )


def chat_logprobs(positions: Sequence[PositionLogprobs]) -> ChatLogprobs:
    """Shapes the log probabilities of an answer.

    Args:
        positions: One entry for each token.
    """
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=position.chosen.text,
                logprob=_finite(position.chosen.logprob),
                bytes=_bytes(position.chosen.text),
                top_logprobs=[_alternative(token) for token in position.top],
            )
            for position in positions
        ]
    )


def _alternative(token: TokenLogprob) -> TokenAlternative:
    return TokenAlternative(
        token=token.text, logprob=_finite(token.logprob), bytes=_bytes(token.text)
    )


def _bytes(text: str) -> list[int] | None:
    # Part of a character shows as a replacement character, whose bytes are not the token's.
    return None if _REPLACEMENT in text else list(text.encode())


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
