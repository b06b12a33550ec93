import random

import pytest

from headlong.profiling.lexicon import (
    ADJECTIVES,
    ADVERBS,
    KINDS_OF_NUMBERS,
    KINDS_OF_PHRASES,
    NAMES,
    OPENINGS,
    PHRASE_WORDS,
    TOPICS,
)
from headlong.profiling.needles import (
    Fact,
    build_needle_prompt,
    distinct_facts,
    filler,
    is_answered,
    needle_prompts,
    random_fact,
)


def count_words(text: str) -> int:
    return len(text.split())


def count_characters(text: str) -> int:
    return len(text)


def count_with_template(text: str) -> int:
    return len(text.split()) + 11


def test_a_fact_is_one_sentence_in_four_views() -> None:
    rng = random.Random(0)
    for _ in range(200):
        fact = random_fact(rng)
        assert fact.statement == f"{fact.lead} {fact.answer}."
        assert fact.question == f"What is the {fact.lead.removeprefix('The ')}?"
        assert fact.lead.split()[-1] in NAMES
        assert fact.answer.isdigit() == any(kind in fact.lead for kind in KINDS_OF_NUMBERS)
        if fact.answer.isdigit():
            assert len(fact.answer) in (4, 6)
        else:
            assert 2 <= len(fact.answer.split()) <= 3


def test_distinct_facts_are_about_different_people() -> None:
    facts = distinct_facts(random.Random(0), len(NAMES))
    assert len({fact.lead.split()[-1] for fact in facts}) == len(NAMES)
    with pytest.raises(ValueError, match="num_facts"):
        distinct_facts(random.Random(0), len(NAMES) + 1)


@pytest.mark.parametrize("num_words", [1, 10, 1000])
def test_filler_is_whole_sentences_of_at_least_the_words(num_words: int) -> None:
    text = filler(random.Random(3), num_words)
    assert num_words <= count_words(text) < num_words + 20
    assert text.endswith(".")
    assert text[0].isupper()
    assert filler(random.Random(3), num_words) == text
    assert filler(random.Random(4), num_words) != text


def test_filler_names_nobody_and_states_no_values() -> None:
    text = filler(random.Random(5), 20_000)
    words = set(text.replace(".", "").replace(",", "").split())
    assert not words & (set(NAMES) | set(PHRASE_WORDS))
    assert not any(character.isdigit() for character in text)
    assert not any(kind in text for kind in (*KINDS_OF_NUMBERS, *KINDS_OF_PHRASES))


def test_the_lexicon_repeats_no_word() -> None:
    for words in (ADJECTIVES, ADVERBS, OPENINGS, NAMES, PHRASE_WORDS):
        assert len(set(words)) == len(words)
    for role in ("people", "verbs", "things"):
        words = [word for topic in TOPICS for word in getattr(topic, role)]
        assert len(set(words)) == len(words), role


@pytest.mark.parametrize("context_tokens", [80, 128, 512, 1000, 8192])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("count", [count_words, count_with_template, count_characters])
def test_a_prompt_fills_its_length(context_tokens: int, depth: float, count) -> None:  # type: ignore[no-untyped-def]
    if count is count_characters:
        context_tokens *= 5
    prompt = build_needle_prompt(count, context_tokens, depth, random.Random(1))
    used = count(prompt.chat[0]["content"])
    missed = context_tokens - used
    slack = 16 if count is count_characters else 8
    assert 0 <= missed <= max(slack, context_tokens // 100)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_needle_lies_at_its_depth_once(depth: float) -> None:
    prompt = build_needle_prompt(count_words, 2000, depth, random.Random(2), num_distractors=6)
    start, end = prompt.needle_span
    assert prompt.haystack[start:end] == prompt.fact.statement
    assert prompt.haystack.count(prompt.fact.lead) == 1
    assert prompt.haystack.count(prompt.fact.answer) == 1
    # Distractors before and behind it may shift the first and the last sentence a little.
    assert start / len(prompt.haystack) == pytest.approx(depth, abs=0.03)
    stated = [name for name in NAMES if f" {name} " in prompt.haystack]
    assert len(stated) == 7


def test_both_ways_of_asking_follow_the_haystack() -> None:
    prompt = build_needle_prompt(count_words, 300, 0.5, random.Random(2))
    (message,) = prompt.chat
    assert message == {
        "role": "user",
        "content": f"{prompt.haystack}\n{prompt.fact.question}",
    }
    assert prompt.completion == f"{prompt.haystack}\n{prompt.fact.lead}"


def test_prompts_repeat_by_seed_and_spread_their_depths() -> None:
    prompts = needle_prompts(count_words, 200, 5, seed=7)
    assert [prompt.depth for prompt in prompts] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert prompts == needle_prompts(count_words, 200, 5, seed=7)
    other = needle_prompts(count_words, 200, 5, seed=8)
    assert {p.fact.statement for p in prompts}.isdisjoint(p.fact.statement for p in other)
    assert needle_prompts(count_words, 200, 1, seed=7)[0].depth == 0.5
    assert needle_prompts(count_words, 200, 0, seed=7) == []


def test_a_plain_seed_does_not_reach_the_held_out_prompts() -> None:
    held_out = {prompt.haystack for prompt in needle_prompts(count_words, 200, 3, seed=0)}
    plain = build_needle_prompt(count_words, 200, 0.0, random.Random(0))
    assert plain.haystack not in held_out


def test_impossible_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="context_tokens=10 "):
        build_needle_prompt(count_words, 10, 0.5, random.Random(0))
    with pytest.raises(ValueError, match="depth"):
        build_needle_prompt(count_words, 100, 1.5, random.Random(0))


@pytest.mark.parametrize(
    ("answer", "generated", "right"),
    [
        ("4821", " 4821.", True),
        ("4821", "The access code Alice 4821.", True),
        ("4821", "482", False),
        ("4821", "48215", False),
        ("4821", "14821", False),
        ("4821", "48 21", False),
        ("amber falcon", " amber falcon.", True),
        ("amber falcon", "amber falcons", False),
        ("amber falcon", "falcon amber", False),
        ("amber falcon", "", False),
    ],
)
def test_only_the_exact_value_is_an_answer(answer: str, generated: str, right: bool) -> None:
    fact = Fact(f"The code Alice {answer}.", "What is the code Alice?", "The code Alice", answer)
    assert is_answered(fact, generated) is right
