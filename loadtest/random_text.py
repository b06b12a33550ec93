"""Texts without sense of an exact number of tokens, no two alike from their first token on."""

import random
import string
from collections.abc import Iterable
from itertools import product

from headlong.loadtest.tokens import Tokenizer
from headlong.profiling.lexicon import ADJECTIVES, ADVERBS, NAMES, PHRASE_WORDS, TOPICS

_NUM_TRIED = 256


class RandomText:
    """Writes random words, each of which is one token of the tokenizer.

    A text begins with a word that no text with another index begins with, as long as there are no
    more texts than such words, and the second word tells further ones apart: a prefix cache finds
    at most one token of a text in the others.

    Attributes:
        separator: Between two words: a space, or nothing where a token is one character.
        words: Words that are one token after another one and the separator.
        openings: Those of them that are also one token at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        """Looks for words of one token.

        Args:
            tokenizer: Counts the tokens.
            seed: Of the order of the words.

        Raises:
            ValueError: If the tokenizer has too few such words.
        """
        rng = random.Random(f"random text {seed}")
        candidates = _candidates(only_words=tokenizer.approximate)
        for self.separator in (" ", ""):
            self.words = _one_token_words(tokenizer, "the", self.separator, candidates)
            self.openings = _one_token_words(tokenizer, "", "", self.words)
            rng.shuffle(self.words)
            rng.shuffle(self.openings)
            if len(self.words) > 1 and self.openings and self._is_additive(tokenizer, rng):
                return
        raise ValueError(
            "the tokenizer has too few words of one token to write texts of a given length; go "
            "without a tokenizer, which counts words instead"
        )

    def draw(self, index: int, num_tokens: int, rng: random.Random) -> list[str]:
        """Draws the words of a text, to be put together with `join`.

        Args:
            index: Of the text among all that are to differ.
            num_tokens: How many; a text of one token may have a twin.
            rng: Of what follows the first two words.
        """
        row, column = divmod(index, len(self.openings))
        unlike = [self.openings[column], self.words[row % len(self.words)]]
        return [*unlike, *rng.choices(self.words, k=max(0, num_tokens - 2))][:num_tokens]

    def join(self, words: Iterable[str]) -> str:
        """Puts words together to a text of as many tokens."""
        return self.separator.join(words)

    def _is_additive(self, tokenizer: Tokenizer, rng: random.Random) -> bool:
        """Tells whether words keep their one token among others."""
        drawn = self.draw(0, _NUM_TRIED, rng)
        return len(tokenizer.encode(self.join(drawn))) == len(drawn)


def _one_token_words(
    tokenizer: Tokenizer, before: str, separator: str, candidates: Iterable[str]
) -> list[str]:
    """Returns the words that add one token to a text, no two of them the same token."""
    already = tokenizer.encode(before)
    words: dict[int, str] = {}
    for word in candidates:
        *rest, last = tokenizer.encode(f"{before}{separator}{word}")
        if rest == already:
            words.setdefault(last, word)
    return list(words.values())


def _candidates(*, only_words: bool) -> list[str]:
    """Common words and names, and else numbers and syllables, which only a real tokenizer judges.

    Each stands once, and always in the same place.
    """
    words = [*ADJECTIVES, *ADVERBS, *NAMES, *PHRASE_WORDS]
    for topic in TOPICS:
        for word in (*topic.people, *topic.things, *topic.verbs):
            words += [word, f"{word}s"]
        for place in topic.places:
            words += place.split()
    if not only_words:
        words += [str(number) for number in range(1000)]
        words += string.ascii_letters
        words += map("".join, product(string.ascii_letters, string.ascii_lowercase))
    return list(dict.fromkeys(words))
