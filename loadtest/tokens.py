"""How a workload counts tokens: by the model's tokenizer, or about, by words."""

import re
import zlib
from collections.abc import Callable
from typing import Protocol

_WORD = re.compile(r"\w+|[^\w\s]")


class Tokenizer(Protocol):
    """What a workload needs of a tokenizer."""

    @property
    def approximate(self) -> bool:
        """Whether its tokens are only about the model's."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without special tokens."""
        ...

    def prompt_counter(self, *, chat: bool) -> Callable[[str], int]:
        """Makes the function that counts the tokens of a whole prompt by its text.

        Args:
            chat: Whether the text is a user's message, to be rendered by the chat template.

        Raises:
            ValueError: If the tokenizer has no chat template.
        """
        ...


class WordTokenizer:
    """An approximation that needs no model: a word or a mark of punctuation is a token.

    Common English words are one token in most vocabularies; rare words and long numbers are more,
    so that a model counts some tokens more than this. What a chat template adds is not counted.
    """

    @property
    def approximate(self) -> bool:
        """Always true."""
        return True

    def encode(self, text: str) -> list[int]:
        """Returns one number for each word, the same for equal words."""
        return [zlib.crc32(word.encode()) for word in _WORD.findall(text)]

    def prompt_counter(self, *, chat: bool) -> Callable[[str], int]:
        """Makes the function that counts the words of a text, in a chat and elsewhere."""
        return lambda content: len(_WORD.findall(content))
