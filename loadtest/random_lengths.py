"""Workload: random texts of random lengths, which no prefix cache can help."""

import math
import random

from headlong.loadtest.checks import check_at_least
from headlong.loadtest.random_text import RandomText
from headlong.loadtest.tokens import Tokenizer
from headlong.loadtest.workload import Session, Turn, Workload


def random_lengths(
    tokenizer: Tokenizer,
    num_prompts: int,
    input_len: int = 1024,
    output_len: int = 128,
    range_ratio: float = 0.0,
    seed: int = 0,
    *,
    chat: bool = False,
) -> Workload:
    """Makes prompts of random words; answers are as long as they may be.

    Lengths are drawn evenly from ``[len · (1 - range_ratio), len · (1 + range_ratio)]``, rounded
    outwards, as by vLLM's bench; at least 1.

    Args:
        tokenizer: Counts the tokens.
        num_prompts: How many.
        input_len: Mean tokens of a prompt, without what a chat template or the server adds.
        output_len: Mean tokens of an answer.
        range_ratio: How far lengths may lie from the mean: 0 (all equal) to below 1.
        seed: Which prompts.
        chat: Whether they are messages of a chat.

    Raises:
        ValueError: If a number is out of its range.
    """
    check_at_least(1, num_prompts=num_prompts, input_len=input_len, output_len=output_len)
    if not 0 <= range_ratio < 1:
        raise ValueError(f"range_ratio must be at least 0 and below 1, got {range_ratio}")
    text = RandomText(tokenizer, seed)
    rng = random.Random(f"random lengths {seed}")
    sessions: list[Session] = []
    for index in range(num_prompts):
        num_tokens = _draw_length(input_len, range_ratio, rng)
        max_tokens = _draw_length(output_len, range_ratio, rng)
        prompt = text.join(text.draw(index, num_tokens, rng))
        sessions.append(Session((Turn(prompt, max_tokens),)))
    return Workload("random", sessions, chat, True, tokenizer.approximate)


def _draw_length(mean: int, range_ratio: float, rng: random.Random) -> int:
    shortest = max(1, math.floor(mean * (1 - range_ratio)))
    return rng.randint(shortest, math.ceil(mean * (1 + range_ratio)))
