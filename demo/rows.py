"""Training rows for the embedded model: tokens, loss weights and positions.

Every row is drawn from a generator that is seeded by (seed, step), so training can stop and go on
at any step and sees the same rows. Tokens that nobody could predict weigh little in the loss; the
tokens that only a look far back can predict weigh much.
"""

import random
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerFast

from headlong.demo.tokenizer import TURN_END, TURN_START
from headlong.profiling.needles import Fact, distinct_facts, filler_sentences

WEIGHT_UNPREDICTABLE = 0.05
WEIGHT_PROSE = 0.2
WEIGHT_COPY = 1.0
WEIGHT_ANSWER = 3.0

# Tokens of one question and its answer in a chat, rounded up.
TURN_TOKENS = 32

# Tokens of one statement, rounded up.
FACT_TOKENS = 12

# Prose to draw from, in paragraphs of about 120 words.
NUM_PARAGRAPHS = 2000

# Most texts of which the tokens are remembered.
CACHE_SIZE = 200_000


@dataclass
class Row:
    """A growing row: token ids, and how much each of them weighs as a target."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, tokens: list[int], weight: float) -> None:
        """Appends tokens that share a weight."""
        self.tokens += tokens
        self.weights += [weight] * len(tokens)

    def extend(self, other: "Row") -> None:
        """Appends another row."""
        self.tokens += other.tokens
        self.weights += other.weights


class RowWriter:
    """Writes training rows of a given length.

    Args:
        tokenizer: Of the model in training.
        seed: Of all rows; see `batch`.
        max_positions: Positions are skipped up to this one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, max_positions: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._max_positions = max_positions
        self._cache: dict[str, list[int]] = {}
        special = {*tokenizer.all_special_ids, *self._encode(TURN_START), *self._encode(TURN_END)}
        self._plain_ids = [i for i in range(len(tokenizer)) if i not in special]
        rng = random.Random(f"prose {seed}")
        paragraphs = [filler_sentences(rng, 120) for _ in range(NUM_PARAGRAPHS)]
        encoded = iter(self._encode_all([f" {line}" for lines in paragraphs for line in lines]))
        self._prose = [[next(encoded) for _ in lines] for lines in paragraphs]

    def batch(
        self, step: int, num_rows: int, row_tokens: int, skip_positions: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Writes the rows of one step.

        Args:
            step: Which step; equal steps give equal rows.
            num_rows: Rows of the batch.
            row_tokens: Tokens of each row.
            skip_positions: Whether positions jump ahead at random places (PoSE, arXiv 2309.10400),
                so that short rows show long distances.

        Returns:
            Token ids int64, loss weights float32 and position ids int64, each
            ``[num_rows, row_tokens]``.
        """
        rng = random.Random(f"rows {self._seed} {step}")
        rows: list[Row] = []
        positions: list[list[int]] = []
        for _ in range(num_rows):
            draw = rng.random()
            if draw < 1 / 3:
                rows.append(self._repeated_spans(row_tokens, rng))
            elif draw < 2 / 3:
                rows.append(self._chat(row_tokens, rng))
            else:
                rows.append(self._plain(row_tokens, rng))
            skip = skip_positions and rng.random() < 0.75
            positions.append(self._positions(row_tokens, skip, rng))
        tokens = torch.tensor([row.tokens for row in rows])
        weights = torch.tensor([row.weights for row in rows])
        return tokens, weights, torch.tensor(positions)

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _encode(self, text: str) -> list[int]:
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if len(self._cache) < CACHE_SIZE:
                self._cache[text] = ids
        return ids

    def _repeated_spans(self, size: int, rng: random.Random) -> Row:
        """Random spans in random order, each of them about two or three times."""
        span_tokens = round(8 * (size / 16) ** rng.random())
        num_spans = max(1, round(size / span_tokens / rng.uniform(2, 3)))
        spans = [rng.choices(self._plain_ids, k=span_tokens) for _ in range(num_spans)]
        row = Row()
        seen: set[int] = set()
        while len(row.tokens) < size:
            index = rng.randrange(num_spans)
            span = spans[index]
            row.add(span[:1], 0.0)
            row.add(span[1:], WEIGHT_COPY if index in seen else 0.0)
            seen.add(index)
        return Row(row.tokens[:size], row.weights[:size])

    def _fact(self, fact: Fact, prefix: str, asked: bool) -> Row:
        """A statement: as news (``asked`` false) or as what the row already said."""
        row = Row()
        row.add(self._encode(f"{prefix}{fact.lead}"), WEIGHT_UNPREDICTABLE)
        answer = self._encode(f" {fact.answer}")
        row.add(answer, WEIGHT_ANSWER if asked else 0.0)
        row.add(self._encode("."), WEIGHT_COPY if asked else WEIGHT_PROSE)
        return row

    def _turn(self, fact: Fact) -> Row:
        """A question, the end of the user's turn, and the assistant's turn."""
        row = Row()
        row.add(self._encode(fact.question), WEIGHT_UNPREDICTABLE)
        row.add(self._encode(f"{TURN_END}\n{TURN_START}assistant\n"), WEIGHT_PROSE)
        row.add(self._encode(fact.lead), WEIGHT_COPY)
        row.add(self._encode(f" {fact.answer}"), WEIGHT_ANSWER)
        row.add(self._encode(f".{TURN_END}"), WEIGHT_COPY)
        row.add(self._encode("\n"), WEIGHT_PROSE)
        return row

    def _haystack(self, size: int, inserted: list[Row], rng: random.Random) -> Row:
        """Prose of exactly ``size`` tokens with rows inserted, in their order, at random places."""
        needed = size - sum(len(row.tokens) for row in inserted)
        sentences: list[list[int]] = []
        while needed > 0:
            for sentence in rng.choice(self._prose):
                # The last one is cut, so that the length is exact.
                sentences.append(sentence[:needed])
                needed -= len(sentence)
                if needed <= 0:
                    break
        places = sorted(rng.randint(0, len(sentences)) for _ in inserted)
        row = Row()
        done = 0
        for index in range(len(sentences) + 1):
            while done < len(places) and places[done] == index:
                row.extend(inserted[done])
                done += 1
            if index < len(sentences):
                row.add(sentences[index], WEIGHT_PROSE)
        return row

    def _chat(self, size: int, rng: random.Random) -> Row:
        """A haystack of facts in the first turn, then questions about them."""
        num_turns = rng.randint(1, max(1, min(size // 2 // TURN_TOKENS, 40)))
        max_facts = (size - num_turns * TURN_TOKENS) // FACT_TOKENS
        facts = distinct_facts(rng, rng.randint(num_turns, max(num_turns, min(max_facts, 64))))
        asked = rng.sample(facts, num_turns)
        tail = Row()
        for number, fact in enumerate(asked):
            tail.add(self._encode("\n" if number == 0 else f"{TURN_START}user\n"), WEIGHT_PROSE)
            tail.extend(self._turn(fact))
        head = Row()
        head.add(self._encode(f"{TURN_START}user\n"), WEIGHT_UNPREDICTABLE)
        stated = [self._fact(fact, " ", asked=False) for fact in facts]
        hay = self._haystack(size - len(head.tokens) - len(tail.tokens), stated, rng)
        head.extend(hay)
        head.extend(tail)
        return Row(head.tokens[:size], head.weights[:size])

    def _plain(self, size: int, rng: random.Random) -> Row:
        """Prose with facts, each stated again once or twice later on."""
        max_facts = max(1, min(size // 4 // FACT_TOKENS, 64))
        facts = distinct_facts(rng, rng.randint(1, max_facts))
        events: list[tuple[float, Fact, bool]] = []
        for fact in facts:
            first, *again = sorted(rng.random() for _ in range(rng.choice((2, 2, 3))))
            events.append((first, fact, False))
            # Half of the repeats stand near the end, where distances are longest.
            events += [
                (rng.uniform(0.9, 1.0) if rng.random() < 0.5 else place, fact, True)
                for place in again
            ]
        events.sort(key=lambda event: event[0])
        inserted: list[Row] = []
        seen: set[str] = set()
        for _, fact, _ in events:
            known = fact.lead in seen
            prefix = "\n" if known and rng.random() < 0.6 else " "
            inserted.append(self._fact(fact, prefix, asked=known))
            seen.add(fact.lead)
        return self._haystack(size, inserted, rng)

    def _positions(self, size: int, skip: bool, rng: random.Random) -> list[int]:
        """Positions of a row: consecutive, or with up to four jumps ahead."""
        positions = list(range(size))
        room = self._max_positions - size
        if not skip or room <= 0:
            return positions
        num_jumps = rng.randint(1, 4)
        reach = room * rng.random()
        cuts = sorted(rng.random() for _ in range(num_jumps))
        for number, place in enumerate(sorted(rng.randrange(1, size) for _ in range(num_jumps))):
            jump = round(reach * (cuts[number] - (cuts[number - 1] if number else 0.0)))
            for index in range(place, size):
                positions[index] += jump
        return positions
