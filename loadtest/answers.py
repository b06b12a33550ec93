"""What the events of a streamed answer say."""

import json
from dataclasses import dataclass, field
from typing import Any

from headlong.loadtest.records import ErrorKind

MAX_DETAIL = 200
MAX_COUNT = 1 << 40
"""No answer has more tokens; figures stay finite whatever a server says."""


class AnswerError(Exception):
    """An answer is an error, or none.

    Attributes:
        kind: Of the failure.
        detail: What was said, shortened.
    """

    def __init__(self, kind: ErrorKind, detail: str) -> None:
        self.kind: ErrorKind = kind
        self.detail = shorten(detail)
        super().__init__(self.detail)


def shorten(text: str) -> str:
    """Makes one line of a message, of at most `MAX_DETAIL` characters, all printable."""
    # What is cut off is cut before it is looked at: it can be as long as a server likes. What a
    # terminal would obey, and what no file can hold, is replaced.
    line = " ".join(text[: 4 * MAX_DETAIL].split())
    line = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in line)
    return line if len(line) <= MAX_DETAIL else f"{line[: MAX_DETAIL - 1]}…"


@dataclass(slots=True)
class StreamedAnswer:
    """Puts an answer together from its events.

    A piece is a chunk with text: that of a completion, a chat's content, its reasoning, or a call
    of a tool. The first chunk of a chat, which only says who speaks, and chunks without text are
    none.

    Attributes:
        chat: Whether chunks are of a chat.
        piece_times_s: When each piece came.
        last_choice_s: When the last chunk with a choice came, which says why the answer ended.
        is_whole: Whether that chunk or the end mark has come.
        num_prompt_tokens: As the last chunk with usage says; None if there was none.
        num_completion_tokens: The same of the answer.
        num_cached_tokens: The same of what was found in the prefix cache.
    """

    chat: bool
    piece_times_s: list[float] = field(default_factory=list)
    last_choice_s: float | None = None
    is_whole: bool = False
    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None
    num_cached_tokens: int | None = None
    _texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What was answered, without reasoning."""
        # JSON can cut a surrogate pair in two, and hold half of one, which no file can.
        joined = "".join(self._texts).encode("utf-16", "surrogatepass")
        return joined.decode("utf-16", "replace")

    def take(self, event: bytes, now_s: float) -> None:
        """Takes one event.

        Args:
            event: Its data.
            now_s: When it came.

        Raises:
            AnswerError: It holds an error, or is not what the API says.
        """
        if event.strip() == b"[DONE]":
            self.is_whole = True
            return
        chunk = _object(event)
        if chunk.get("error"):
            raise AnswerError("stream", error_message(chunk))
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._take_usage(usage)
        choices = chunk.get("choices")
        if choices is None and usage:
            return
        if not isinstance(choices, list):
            raise AnswerError("protocol", f"a chunk without choices: {_shown(event)}")
        if not choices:
            return
        choice = choices[0]
        if not isinstance(choice, dict):
            raise AnswerError("protocol", f"a choice that is no object: {_shown(event)}")
        self.last_choice_s = now_s
        if self._take_choice(choice):
            self.piece_times_s.append(now_s)
        if choice.get("finish_reason"):
            self.is_whole = True

    def _take_choice(self, choice: dict[str, Any]) -> bool:
        """Whether there is text in it."""
        if not self.chat:
            return self._take_text(choice.get("text"))
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return False
        thought = (delta.get("reasoning_content"), delta.get("reasoning"), delta.get("tool_calls"))
        return self._take_text(delta.get("content")) or any(thought)

    def _take_text(self, text: object) -> bool:
        if not isinstance(text, str) or not text:
            return False
        self._texts.append(text)
        return True

    def _take_usage(self, usage: dict[str, Any]) -> None:
        self.num_prompt_tokens = _count(usage.get("prompt_tokens"), self.num_prompt_tokens)
        self.num_completion_tokens = _count(
            usage.get("completion_tokens"), self.num_completion_tokens
        )
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self.num_cached_tokens = _count(details.get("cached_tokens"), self.num_cached_tokens)


def error_message(body: dict[str, Any]) -> str:
    """Finds what an error's body says, in the forms that servers have for it."""
    error = body.get("error") or body.get("detail") or body.get("message") or body
    if isinstance(error, dict):
        error = error.get("message") or error
    return error if isinstance(error, str) else json.dumps(error)


def _object(event: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(event)
    except (ValueError, RecursionError) as error:
        raise AnswerError("protocol", f"a chunk that is not JSON: {_shown(event)}") from error
    if not isinstance(chunk, dict):
        raise AnswerError("protocol", f"a chunk that is no object: {_shown(event)}")
    return chunk


def _count(value: object, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) and 0 <= value < MAX_COUNT else otherwise


def _shown(event: bytes) -> str:
    return event[: 2 * MAX_DETAIL].decode(errors="replace")
