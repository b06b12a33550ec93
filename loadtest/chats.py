"""Workload: chats about a long document, each question about another fact in it."""

import random
from dataclasses import dataclass

from headlong.loadtest.checks import check_at_least
from headlong.loadtest.tokens import Tokenizer
from headlong.loadtest.workload import Session, Turn, Workload
from headlong.profiling.lexicon import NAMES
from headlong.profiling.needles import Fact, distinct_facts
from headlong.profiling.tasks.task import Room, fill_with_prose


@dataclass(frozen=True, slots=True)
class _Document:
    """Prose, and the facts that it states."""

    text: str
    facts: tuple[Fact, ...]


def chats(
    tokenizer: Tokenizer,
    num_sessions: int,
    num_turns: int = 4,
    document_len: int = 4096,
    output_len: int = 32,
    seed: int = 0,
    *,
    shared_document: bool = False,
    ignore_eos: bool = False,
) -> Workload:
    """Makes chats whose first message is a document and a question; more questions follow.

    Every turn asks for another fact of the document, so that each answer is judged.

    Args:
        tokenizer: Counts the tokens.
        num_sessions: How many chats.
        num_turns: Questions of each.
        document_len: Tokens of the first prompt, its chat template included; missed by under 1 % or
            8 tokens.
        output_len: Most tokens of an answer.
        seed: Which documents and questions.
        shared_document: Whether all chats are about one document, in an order of their own; each
            has its own otherwise.
        ignore_eos: Whether answers go on to their full length after the fact.

    Raises:
        ValueError: If a number is out of its range, or the document too short for its facts.
    """
    check_at_least(
        1,
        num_sessions=num_sessions,
        num_turns=num_turns,
        document_len=document_len,
        output_len=output_len,
    )
    if num_turns > len(NAMES):
        raise ValueError(f"num_turns must be at most {len(NAMES)}, got {num_turns}")
    room = Room(tokenizer.prompt_counter(chat=True), document_len, chat=True)
    shared = _write_document(room, num_turns, f"{seed}, shared") if shared_document else None
    sessions: list[Session] = []
    for index in range(num_sessions):
        document = shared or _write_document(room, num_turns, f"{seed}, document {index}")
        rng = random.Random(f"chats {seed}, questions {index}")
        turns = [
            Turn(fact.question, output_len, fact.answer)
            for fact in rng.sample(document.facts, num_turns)
        ]
        first = Turn(f"{document.text}\n{turns[0].prompt}", output_len, turns[0].expected)
        sessions.append(Session((first, *turns[1:])))
    return Workload("chat", sessions, True, ignore_eos, tokenizer.approximate)


def _write_document(room: Room, num_facts: int, seed: str) -> _Document:
    """Writes prose that states facts in random places and, with a question, fills the room."""
    rng = random.Random(f"chats {seed}")
    facts = distinct_facts(rng, num_facts)
    statements = [(rng.random(), fact.statement) for fact in facts]
    longest = max((fact.question for fact in facts), key=room.count_tokens)
    try:
        prompt = fill_with_prose(room, rng, statements, longest)
    except ValueError as error:
        raise ValueError(f"document_len cannot hold {num_facts} facts: {error}") from error
    return _Document(prompt.removesuffix(f"\n{longest}"), tuple(facts))
