"""Workload: groups of prompts that begin alike, as with system prompts that many users share."""

import random

from headlong.loadtest.checks import check_at_least
from headlong.loadtest.random_text import RandomText
from headlong.loadtest.tokens import Tokenizer
from headlong.loadtest.workload import Session, Turn, Workload


def shared_prefixes(
    tokenizer: Tokenizer,
    num_prompts: int,
    num_prefixes: int = 10,
    prefix_len: int = 1024,
    suffix_len: int = 128,
    output_len: int = 128,
    seed: int = 0,
    *,
    chat: bool = False,
) -> Workload:
    """Makes prompts of random words that share their prefix with the others of their group.

    Prompts are dealt to the groups evenly and then shuffled. Within a group they differ from the
    first token after the prefix on; groups differ from the first token on. Answers are as long as
    they may be.

    Args:
        tokenizer: Counts the tokens.
        num_prompts: How many, of all groups together.
        num_prefixes: Groups; at most one for each prompt.
        prefix_len: Tokens that a group shares.
        suffix_len: Tokens of each prompt after those.
        output_len: Tokens of an answer.
        seed: Which prompts, and their order.
        chat: Whether they are messages of a chat.

    Raises:
        ValueError: If a number is out of its range.
    """
    check_at_least(
        1,
        num_prompts=num_prompts,
        num_prefixes=num_prefixes,
        prefix_len=prefix_len,
        suffix_len=suffix_len,
        output_len=output_len,
    )
    if num_prefixes > num_prompts:
        raise ValueError(
            f"num_prefixes must be at most one for each of the {num_prompts} prompts, "
            f"got {num_prefixes}"
        )
    text = RandomText(tokenizer, seed)
    rng = random.Random(f"shared prefixes {seed}")
    prefixes = [text.draw(group, prefix_len, rng) for group in range(num_prefixes)]
    sessions: list[Session] = []
    for index in range(num_prompts):
        within, group = divmod(index, num_prefixes)
        suffix = text.draw(within, suffix_len, rng)
        prompt = text.join((*prefixes[group], *suffix))
        sessions.append(Session((Turn(prompt, output_len),)))
    rng.shuffle(sessions)
    return Workload("shared-prefix", sessions, chat, True, tokenizer.approximate)
