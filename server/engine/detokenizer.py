"""From token ids to text, as they come: never part of a character, never part of a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 6
MAX_PENDING_TOKENS = 64
"""Tokens that may wait for the rest of a character: bytes that never make one must not pile up."""


class Detokenizer:
    """Text of one completion.

    Tokens are decoded together with the few before them, since a token's text can depend on what
    precedes it (a leading space, the bytes of one character). Text that ends in an incomplete
    character waits for the next token.

    Args:
        tokenizer: The model's.
        prompt_token_ids: The prompt; its last tokens are context.
        skip_special_tokens: Leave special tokens out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(prompt_token_ids)
        self._shown = 0
        self._known = ""
        self._advance()
        # A prompt of token ids may end inside a character: that one is still to be shown.
        while self._known.endswith(REPLACEMENT):
            self._shown -= 1
            self._known = self._decode(self._ids[: self._shown])

    def push(self, token_id: int) -> str:
        """Text that a token completes; may be empty."""
        self._ids.append(token_id)
        text = self._pending()
        if text.endswith(REPLACEMENT) and len(self._ids) - self._shown < MAX_PENDING_TOKENS:
            return ""
        self._advance()
        return text

    def finish(self) -> str:
        """What is left at the end; an incomplete character shows as U+FFFD."""
        text = self._pending()
        self._advance()
        return text

    def _pending(self) -> str:
        return self._decode(self._ids)[len(self._known) :]

    def _advance(self) -> None:
        self._ids = self._ids[-CONTEXT_TOKENS:]
        self._known = self._decode(self._ids)
        # Single bytes in a row are decoded as a whole: half a character would spoil all of them.
        while len(self._ids) > 1 and self._known.startswith(REPLACEMENT):
            del self._ids[0]
            self._known = self._decode(self._ids)
        self._shown = len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids,
            skip_special_tokens=self._skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text


class StopStrings:
    """Finds stop strings in text that comes in pieces, and holds back what may become one.

    Args:
        stop: The strings.
        include: Whether a stop string is part of the text.
    """

    def __init__(self, stop: Sequence[str], *, include: bool) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text.

        Returns:
            Text that is safe to show, and the stop string that was found, if one was; nothing
            that follows a stop string is ever shown.
        """
        if not self._stop:
            return text, None
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            # The earliest end wins: it is the one a reader of single characters meets first.
            start, stop = min(found, key=lambda each: each[0] + len(each[1]))
            self._held = ""
            return text[: start + len(stop) if self._include else start], stop
        keep = max(self._overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """What was held back, now that nothing follows it."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest proper prefix of `stop` that `text` ends with."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
