"""Synthetic English with facts in it: one source for training, profiling and evaluation.

A prompt is filler prose (the haystack) with one fact to be found (the needle) and some facts of
the same shape about other people (distractors). The name stands directly before the value, so
that a head which attends to "what followed this name before" is a head that retrieves.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from headlong.profiling.lexicon import (
    ADJECTIVES,
    ADVERBS,
    KINDS_OF_NUMBERS,
    KINDS_OF_PHRASES,
    NAMES,
    OPENINGS,
    PHRASE_WORDS,
    SHORT_SENTENCES,
    TOPICS,
    Topic,
)

TOPIC_STAY_PROBABILITY = 0.85


@dataclass(frozen=True)
class Fact:
    """One statement that can be asked for.

    Attributes:
        statement: The whole sentence, ``"The access code Alice 4821."``.
        question: Asks for it in a chat, ``"What is the access code Alice?"``.
        lead: The statement up to its value, ``"The access code Alice"``.
        answer: The value alone, ``"4821"``.
    """

    statement: str
    question: str
    lead: str
    answer: str


@dataclass(frozen=True)
class NeedlePrompt:
    """A haystack with one fact inside that is asked for.

    Attributes:
        haystack: Filler with distractors and the needle.
        fact: The needle.
        depth: Where the needle was asked to be, 0 (start) to 1 (end).
        needle_span: Character offsets ``[start, end)`` of ``fact.statement`` in ``haystack``.
    """

    haystack: str
    fact: Fact
    depth: float
    needle_span: tuple[int, int]

    @property
    def chat(self) -> list[dict[str, str]]:
        """One user message: the haystack, a newline, the question."""
        return [{"role": "user", "content": f"{self.haystack}\n{self.fact.question}"}]

    @property
    def completion(self) -> str:
        """The haystack, a newline, and the statement's beginning; the value follows directly."""
        return f"{self.haystack}\n{self.fact.lead}"


def make_fact(kind: str, name: str, answer: str) -> Fact:
    """Builds the sentences of one fact.

    Args:
        kind: What the value is, ``"access code"``.
        name: Whose it is.
        answer: The value.
    """
    lead = f"The {kind} {name}"
    return Fact(f"{lead} {answer}.", f"What is the {kind} {name}?", lead, answer)


def random_fact(rng: random.Random) -> Fact:
    """Draws a fact: 4 or 6 digits for two kinds in three, else 2 or 3 words."""
    return _fact_about(rng.choice(NAMES), rng)


def distinct_facts(rng: random.Random, num_facts: int) -> list[Fact]:
    """Draws facts about different people.

    Raises:
        ValueError: If there are fewer names than facts asked for.
    """
    if not 0 <= num_facts <= len(NAMES):
        raise ValueError(f"num_facts must be 0 to {len(NAMES)}, got {num_facts}")
    return [_fact_about(name, rng) for name in rng.sample(NAMES, num_facts)]


def _fact_about(name: str, rng: random.Random) -> Fact:
    if rng.random() < 2 / 3:
        digits = rng.choice((4, 6))
        value = "".join(rng.choices("0123456789", k=digits))
        return make_fact(rng.choice(KINDS_OF_NUMBERS), name, value)
    words = rng.sample(PHRASE_WORDS, rng.choice((2, 3)))
    return make_fact(rng.choice(KINDS_OF_PHRASES), name, " ".join(words))


def filler_sentences(rng: random.Random, num_words: int) -> list[str]:
    """Writes whole sentences until they hold at least ``num_words`` words.

    The topic is a Markov chain; verbs agree with their subjects in number; a sentence may speak of
    the one before with a pronoun.
    """
    sentences: list[str] = []
    topic = rng.choice(TOPICS)
    pronoun = ""
    written = 0
    while written < num_words:
        if rng.random() > TOPIC_STAY_PROBABILITY:
            topic, pronoun = rng.choice(TOPICS), ""
        sentence, pronoun = _sentence(topic, pronoun, rng)
        sentences.append(sentence)
        written += sentence.count(" ") + 1
    return sentences


def filler(rng: random.Random, num_words: int) -> str:
    """Writes filler prose of at least ``num_words`` words, in whole sentences."""
    return " ".join(filler_sentences(rng, num_words))


def _sentence(topic: Topic, pronoun: str, rng: random.Random) -> tuple[str, str]:
    """Returns a sentence and the pronoun that stands for its subject."""
    plural = rng.random() < 0.5
    if pronoun and rng.random() < 0.4:
        plural = pronoun == "they"
        subject = pronoun
    else:
        subject = _noun(rng.choice(topic.people), plural, rng)
        pronoun = "they" if plural else "she" if rng.random() < 0.5 else "he"
    verb = rng.choice(topic.verbs) + ("" if plural else "s")
    if rng.random() < 0.25:
        verb = f"{rng.choice(ADVERBS)} {verb}"
    clause = f"{subject} {verb} {_noun(rng.choice(topic.things), rng.random() < 0.5, rng)}"
    if rng.random() < 0.5:
        clause = f"{clause} {rng.choice(topic.places)}"
    if rng.random() < 0.25:
        return f"{rng.choice(OPENINGS)}, {clause}.", pronoun
    return f"{clause[0].upper()}{clause[1:]}.", pronoun


def _noun(noun: str, plural: bool, rng: random.Random) -> str:
    words = f"{rng.choice(ADJECTIVES)} {noun}" if rng.random() < 0.4 else noun
    return f"the {words}s" if plural else f"the {words}"


def build_needle_prompt(
    count_tokens: Callable[[str], int],
    context_tokens: int,
    depth: float,
    rng: random.Random,
    num_distractors: int = 4,
) -> NeedlePrompt:
    """Builds a prompt that fills ``context_tokens``.

    Args:
        count_tokens: Tokens of the whole prompt when the user's message is this text. Count the
            rendered chat template in it to have the template inside ``context_tokens``.
        context_tokens: The length to fill: never exceeded, and missed by under 1 % or 8 tokens.
        depth: Where the needle goes: 0 is the start of the haystack, 1 its end.
        rng: The only source of chance.
        num_distractors: How many facts about other people are placed at random depths.

    Raises:
        ValueError: If ``depth`` is outside 0 to 1, or the facts alone exceed ``context_tokens``.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be 0 to 1, got {depth}")
    needle, *distractors = distinct_facts(rng, num_distractors + 1)
    places = [rng.random() for _ in distractors]
    # A word is at least about one token in every tokenizer, so this is always enough filler.
    sentences = filler_sentences(rng, context_tokens)
    padding = rng.choices(SHORT_SENTENCES, k=64)

    def build(num_sentences: int, num_padding: int) -> NeedlePrompt:
        parts = sentences[:num_sentences] + padding[:num_padding]
        inserted = [(depth, needle.statement)]
        inserted += [(p, d.statement) for p, d in zip(places, distractors, strict=True)]
        # From the back, so that an insertion does not move the places still to be filled.
        size = len(parts)
        for place, statement in sorted(inserted, reverse=True):
            parts.insert(round(place * size), statement)
        haystack = " ".join(parts)
        start = haystack.index(needle.statement)
        return NeedlePrompt(haystack, needle, depth, (start, start + len(needle.statement)))

    def fits(num_sentences: int, num_padding: int) -> bool:
        content = build(num_sentences, num_padding).chat[0]["content"]
        return count_tokens(content) <= context_tokens

    if not fits(0, 0):
        raise ValueError(f"context_tokens={context_tokens} is too short to hold the facts")
    num_sentences = _largest(lambda n: fits(n, 0), len(sentences))
    num_padding = _largest(lambda n: fits(num_sentences, n), len(padding))
    return build(num_sentences, num_padding)


def _largest(holds: Callable[[int], bool], limit: int) -> int:
    """Returns the largest ``n <= limit`` for which ``holds(n)``, where ``holds(0)`` is true."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def needle_prompts(
    count_tokens: Callable[[str], int],
    context_tokens: int,
    num_prompts: int,
    seed: int,
    num_distractors: int = 4,
) -> list[NeedlePrompt]:
    """Builds prompts whose needles lie at depths spread evenly from 0 to 1.

    Equal arguments give equal prompts. The stream of chance is derived from a text that only this
    function uses, so no seed gives prompts that training has seen.

    Args:
        count_tokens: As in `build_needle_prompt`.
        context_tokens: As in `build_needle_prompt`.
        num_prompts: How many; one alone lies at depth 0.5.
        seed: Which set of prompts.
        num_distractors: As in `build_needle_prompt`.
    """
    rng = random.Random(f"needle prompts, held out {seed}")
    depths = [i / (num_prompts - 1) for i in range(num_prompts)] if num_prompts > 1 else [0.5]
    return [
        build_needle_prompt(count_tokens, context_tokens, depth, rng, num_distractors)
        for depth in depths[:num_prompts]
    ]


def is_answered(fact: Fact, generated: str) -> bool:
    """Tells whether a generated text holds the fact's value exactly, as a whole word or number."""
    return re.search(rf"(?<!\w){re.escape(fact.answer)}(?!\w)", generated) is not None
