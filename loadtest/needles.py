"""Workload: questions about a fact in a long text, so that answers are judged under load."""

from collections.abc import Sequence

from headlong.loadtest.checks import check_at_least
from headlong.loadtest.tokens import Tokenizer
from headlong.loadtest.workload import Session, Turn, Workload
from headlong.profiling.tasks.needle import Needle
from headlong.profiling.tasks.task import Room

NUM_DEPTHS = 10
"""Depths that the facts of one length take turns at, spread evenly from start to end."""


def needles(
    tokenizer: Tokenizer,
    num_prompts: int,
    context_lens: Sequence[int] = (1024,),
    seed: int = 0,
    *,
    chat: bool = True,
    ignore_eos: bool = False,
) -> Workload:
    """Makes needle questions, as `headlong eval` asks them, whose lengths take turns.

    Args:
        tokenizer: Counts the tokens of the whole prompt, its chat template included.
        num_prompts: How many, of all lengths together.
        context_lens: Tokens of a prompt: never exceeded, and missed by under 1 % or 8 tokens.
        seed: Which questions.
        chat: As a user's message, or as text to be completed.
        ignore_eos: Whether answers go on to their full length after the fact.

    Raises:
        ValueError: If a number is out of its range, or a length too short for its question.
    """
    check_at_least(1, num_prompts=num_prompts)
    if not context_lens:
        raise ValueError("context_lens must name at least one length")
    count_tokens = tokenizer.prompt_counter(chat=chat)
    task = Needle()
    try:
        by_length = [
            task.samples(Room(count_tokens, length, chat), num_of_length, NUM_DEPTHS, seed)
            for turn, length in enumerate(context_lens)
            if (num_of_length := len(range(turn, num_prompts, len(context_lens))))
        ]
    except ValueError as error:
        raise ValueError(f"context_lens cannot hold a question: {error}") from error
    sessions: list[Session] = []
    for index in range(num_prompts):
        row, column = divmod(index, len(context_lens))
        sample = by_length[column][row]
        turn = Turn(sample.prompt, task.max_new_tokens, sample.references[0])
        sessions.append(Session((turn,)))
    return Workload("needle", sessions, chat, ignore_eos, tokenizer.approximate)
