"""Workloads of random words, chats and needles: their lengths, and what they share."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pipeline
from tokenizers import models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headlong.demo.paths import MODEL_DIR
from headlong.loadtest.chats import chats
from headlong.loadtest.hub_tokenizer import HubTokenizer, load_tokenizer
from headlong.loadtest.needles import needles
from headlong.loadtest.random_lengths import random_lengths
from headlong.loadtest.random_text import RandomText
from headlong.loadtest.shared_prefixes import shared_prefixes
from headlong.loadtest.tokens import Tokenizer, WordTokenizer
from headlong.loadtest.workload import Workload
from headlong.profiling.needles import filler


@cache
def model_tokenizer() -> Tokenizer:
    return load_tokenizer(str(MODEL_DIR))


@cache
def metaspace_tokenizer() -> Tokenizer:
    """As SentencePiece does it: a mark for each space, and one before the text."""
    pipeline = Pipeline(models.Unigram())
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=600, show_progress=False, unk_token="<unk>")  # type: ignore[call-arg]
    pipeline.train_from_iterator([filler(random.Random(0), 20_000)], trainer)
    return HubTokenizer(PreTrainedTokenizerFast(tokenizer_object=pipeline))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "model": model_tokenizer,
    "metaspace": metaspace_tokenizer,
    "words": WordTokenizer,
}
each_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


def prompts(workload: Workload) -> list[str]:
    return [session.turns[0].prompt for session in workload.sessions]


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two prompts begin with alike."""
    differing = [a != b for a, b in zip(first, second, strict=False)]
    return differing.index(True) if any(differing) else len(differing)


@each_tokenizer
def test_random_prompts_have_their_lengths_and_share_no_beginning(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    workload = random_lengths(tokenizer, 60, 100, 20, 0.25, seed=1)
    assert (workload.name, workload.chat, workload.ignore_eos) == ("random", False, True)
    assert workload.approximate_lengths is (kind == "words")
    encoded = [tokenizer.encode(prompt) for prompt in prompts(workload)]
    assert all(75 <= len(tokens) <= 125 for tokens in encoded)
    assert len({len(tokens) for tokens in encoded}) > 20
    outputs = [session.turns[0].max_tokens for session in workload.sessions]
    assert all(15 <= output <= 25 for output in outputs)
    assert len(set(outputs)) > 5
    assert len({tokens[0] for tokens in encoded}) == 60


@settings(max_examples=30)
@given(
    st.integers(1, 300), st.integers(1, 64), st.floats(0, 1, exclude_max=True), st.integers(0, 99)
)
def test_lengths_stay_in_their_range(mean: int, output: int, ratio: float, seed: int) -> None:
    workload = random_lengths(WordTokenizer(), 20, mean, output, ratio, seed)
    for session in workload.sessions:
        (turn,) = session.turns
        assert max(1, int(mean * (1 - ratio))) <= len(turn.prompt.split()) <= 2 * mean
        assert max(1, int(output * (1 - ratio))) <= turn.max_tokens <= 2 * output
        if ratio == 0:
            assert (len(turn.prompt.split()), turn.max_tokens) == (mean, output)


@each_tokenizer
def test_more_prompts_than_first_words_share_one_token_at_most(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    text = RandomText(tokenizer, 0)
    number = 3 * len(text.openings)
    workload = random_lengths(tokenizer, number, 3, 1)
    beginnings = Counter(tuple(tokenizer.encode(prompt)[:2]) for prompt in prompts(workload))
    assert len(beginnings) == number


def test_a_tokenizer_of_single_bytes_gives_texts_without_spaces(
    tiny_model: Callable[[str], Path],
) -> None:
    tokenizer = load_tokenizer(str(tiny_model("llama")))
    (prompt,) = prompts(random_lengths(tokenizer, 1, 50, 1))
    assert len(tokenizer.encode(prompt)) == 50
    assert " " not in prompt


def test_a_tokenizer_without_words_of_one_token_is_refused() -> None:
    class Pairs(WordTokenizer):
        def encode(self, text: str) -> list[int]:
            return [token for letter in text for token in (0, ord(letter))]

    with pytest.raises(ValueError, match=r"^the tokenizer has too few words of one token"):
        RandomText(Pairs(), 0)


@each_tokenizer
def test_prompts_share_their_groups_prefix_and_nothing_else(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    workload = shared_prefixes(tokenizer, 24, 4, prefix_len=50, suffix_len=10, output_len=7, seed=2)
    assert (workload.name, workload.ignore_eos) == ("shared-prefix", True)
    encoded = [tokenizer.encode(prompt) for prompt in prompts(workload)]
    assert {len(tokens) for tokens in encoded} == {60}
    assert {session.turns[0].max_tokens for session in workload.sessions} == {7}
    groups = Counter(tuple(tokens[:50]) for tokens in encoded)
    assert list(groups.values()) == [6, 6, 6, 6]
    for first, second in combinations(encoded, 2):
        assert shared_length(first, second) == (50 if first[:50] == second[:50] else 0)
    order = [list(groups).index(tuple(tokens[:50])) for tokens in encoded]
    assert order != sorted(order)
    assert order != [index % 4 for index in range(24)]


def test_needle_questions_take_turns_at_their_lengths() -> None:
    tokenizer = model_tokenizer()
    workload = needles(tokenizer, 7, (256, 1024), seed=3)
    assert (workload.name, workload.chat, workload.ignore_eos) == ("needle", True, False)
    count = tokenizer.prompt_counter(chat=True)
    for index, session in enumerate(workload.sessions):
        (turn,) = session.turns
        length = (256, 1024)[index % 2]
        assert length - max(8, length // 100) <= count(turn.prompt) <= length
        assert turn.expected is not None
        asked = turn.prompt.rpartition("\nWhat is the ")[2].removesuffix("?")
        assert f"The {asked} {turn.expected}." in turn.prompt
        assert turn.max_tokens >= len(tokenizer.encode(f"The {asked} {turn.expected}."))
    completions = needles(tokenizer, 1, seed=3, chat=False, ignore_eos=True)
    assert not completions.chat
    assert completions.ignore_eos
    assert "?" not in completions.sessions[0].turns[0].prompt


@pytest.mark.parametrize("shared", [False, True])
def test_chats_ask_for_another_fact_of_their_document_in_each_turn(shared: bool) -> None:
    tokenizer = model_tokenizer()
    workload = chats(tokenizer, 5, 3, 512, 24, seed=4, shared_document=shared)
    assert (workload.name, workload.chat, workload.ignore_eos) == ("chat", True, False)
    count = tokenizer.prompt_counter(chat=True)
    documents = [prompt.rpartition("\n")[0] for prompt in prompts(workload)]
    assert len(set(documents)) == (1 if shared else 5)
    orders: set[tuple[str, ...]] = set()
    for session, document in zip(workload.sessions, documents, strict=True):
        first = session.turns[0].prompt
        assert 512 - 16 <= count(first) <= 512
        questions = [turn.prompt.removeprefix(f"{document}\n") for turn in session.turns]
        assert len(set(questions)) == len(questions) == 3
        orders.add(tuple(questions))
        for question, turn in zip(questions, session.turns, strict=True):
            asked = question.removeprefix("What is the ").removesuffix("?")
            assert f"The {asked} {turn.expected}." in document
            assert turn.max_tokens == 24
    assert len(orders) > 1


MAKERS: dict[str, Callable[[int], Workload]] = {
    "random": lambda seed: random_lengths(WordTokenizer(), 9, 40, 9, 0.5, seed),
    "shared": lambda seed: shared_prefixes(WordTokenizer(), 9, 3, 20, 5, 2, seed),
    "needle": lambda seed: needles(WordTokenizer(), 4, (128,), seed),
    "chat": lambda seed: chats(WordTokenizer(), 3, 2, 128, seed=seed),
    "chat of one document": lambda seed: chats(
        WordTokenizer(), 3, 2, 128, seed=seed, shared_document=True
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_equal_seeds_give_equal_workloads_and_others_do_not(name: str) -> None:
    make = MAKERS[name]
    assert make(5) == make(5)
    assert set(prompts(make(5))).isdisjoint(prompts(make(6)))
    assert make(5).approximate_lengths
    assert all(session.start_s is None for session in make(5).sessions)


WORDS = WordTokenizer()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_lengths(WORDS, 0), "num_prompts must be at least 1, got 0"),
        (lambda: random_lengths(WORDS, 1, 0), "input_len must be at least 1, got 0"),
        (lambda: random_lengths(WORDS, 1, 1, -1), "output_len must be at least 1, got -1"),
        (
            lambda: random_lengths(WORDS, 1, range_ratio=1.0),
            "range_ratio must be at least 0 and below 1, got 1.0",
        ),
        (
            lambda: random_lengths(WORDS, 1, range_ratio=float("nan")),
            "range_ratio must be at least 0 and below 1, got nan",
        ),
        (lambda: shared_prefixes(WORDS, 3, 0), "num_prefixes must be at least 1, got 0"),
        (
            lambda: shared_prefixes(WORDS, 3, 4),
            "num_prefixes must be at most one for each of the 3",
        ),
        (lambda: shared_prefixes(WORDS, 3, 1, 0), "prefix_len must be at least 1, got 0"),
        (lambda: shared_prefixes(WORDS, 3, 1, 1, 0), "suffix_len must be at least 1, got 0"),
        (lambda: needles(WORDS, 0), "num_prompts must be at least 1, got 0"),
        (lambda: needles(WORDS, 1, ()), "context_lens must name at least one length"),
        (lambda: needles(WORDS, 1, (9,)), "context_lens cannot hold a question: .*=9 is too short"),
        (lambda: chats(WORDS, 1, 0), "num_turns must be at least 1, got 0"),
        (lambda: chats(WORDS, 1, 97), "num_turns must be at most 96, got 97"),
        (lambda: chats(WORDS, 1, 4, 9), "document_len cannot hold 4 facts: .*=9 is too short"),
    ],
)
def test_a_bad_number_is_named(make: Callable[[], Workload], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
