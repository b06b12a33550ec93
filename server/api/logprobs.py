"""Log probabilities in the shapes of the two endpoints."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from headlong.server.api.schemas_chat import ChatLogprobs, ChatTokenLogprob, TokenAlternative
from headlong.server.api.schemas_completions import CompletionLogprobs
from headlong.server.engine.detokenizer import Detokenizer
from headlong.server.engine.outputs import PositionLogprobs, TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenOffsets:
    """Where in a text each of its tokens begins.

    A token that is only part of a character begins where the character does.

    Args:
        tokenizer: The model's.
        context: Tokens before the first one.
        start: Characters before the first one.
        skip_special_tokens: Whether special tokens are left out of the text.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        context: Sequence[int],
        start: int,
        *,
        skip_special_tokens: bool,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, context, skip_special_tokens=skip_special_tokens)
        self._num_chars = start

    def push(self, token_id: int) -> int:
        """Returns where the next token begins, in characters."""
        begin = self._num_chars
        self._num_chars += len(self._detokenizer.push(token_id))
        return begin


def completion_logprobs(
    positions: Sequence[PositionLogprobs], offsets: Sequence[int]
) -> CompletionLogprobs:
    """Shapes the log probabilities of a text completion.

    The chosen token's entry is always among `top_logprobs`, with the same number. Tokens with
    equal text share one entry there: the chosen one's, or the most probable one's.

    Args:
        positions: One entry for each token.
        offsets: Where each of them begins, in characters.
    """
    top: list[dict[str, float] | None] = []
    for position in positions:
        # Worst first, so that the better of two equal texts stays.
        best = [*reversed(position.top), position.chosen]
        top.append({token.text: _finite(token.logprob) for token in best})
    return CompletionLogprobs(
        tokens=[position.chosen.text for position in positions],
        token_logprobs=[_finite(position.chosen.logprob) for position in positions],
        top_logprobs=top,
        text_offset=list(offsets),
    )


def joined_logprobs(pieces: Iterable[CompletionLogprobs]) -> CompletionLogprobs:
    """Joins log probabilities that follow each other."""
    joined = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for piece in pieces:
        joined.tokens += piece.tokens
        joined.token_logprobs += piece.token_logprobs
        joined.top_logprobs += piece.top_logprobs
        joined.text_offset += piece.text_offset
    return joined


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
