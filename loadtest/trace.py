"""Workload: requests that once came, at the times at which they came."""

import random
from pathlib import Path
from typing import Literal

from headlong.loadtest.checks import check_at_least, check_positive
from headlong.loadtest.random_text import RandomText
from headlong.loadtest.tokens import Tokenizer
from headlong.loadtest.trace_lines import TraceRequest, read_trace
from headlong.loadtest.workload import Session, Turn, Workload

TimeUnit = Literal["s", "ms"]

MOONCAKE_BLOCK_SIZE = 512
"""Tokens that a hash id stands for in Mooncake's traces."""


def trace(
    path: Path,
    tokenizer: Tokenizer,
    num_prompts: int | None = None,
    output_len: int = 128,
    speed: float = 1.0,
    seed: int = 0,
    *,
    timestamp_unit: TimeUnit | None = None,
    block_size: int = MOONCAKE_BLOCK_SIZE,
) -> Workload:
    """Makes the requests of a JSONL file (see `trace_lines`); the first is sent at 0.

    Prompts of which only the length is known are random words, alike where their hash ids begin
    alike. Answers are as long as they may be where the file gives ``output_length``, which is what
    an answer had; ``max_tokens`` only limits them.

    Args:
        path: The file.
        tokenizer: Counts the tokens of prompts of which only the length is known.
        num_prompts: How many from the start of the file on; None takes all.
        output_len: Most tokens of an answer where the file does not say.
        speed: How many times faster than they came the requests are sent.
        seed: Which random words.
        timestamp_unit: Of the file's times; None is milliseconds for Mooncake's traces, those with
            ``hash_ids``, and seconds for all others.
        block_size: Tokens that a hash id stands for.

    Raises:
        ValueError: If a number is out of its range, or the file is not a trace; it names the line.
    """
    check_at_least(1, output_len=output_len, block_size=block_size)
    check_positive(speed=speed)
    if num_prompts is not None:
        check_at_least(1, num_prompts=num_prompts)
    requests = read_trace(path, block_size, num_prompts)
    shape = requests[0].shape
    only_lengths = shape.body == "input_length"
    unit = timestamp_unit or ("ms" if only_lengths else "s")
    times = [(each.timestamp - requests[0].timestamp) / speed for each in requests]
    if unit == "ms":
        times = [time / 1000 for time in times]
    if only_lengths:
        blocks = _Blocks(tokenizer, block_size, seed)
        prompts = [blocks.prompt(each) for each in requests]
    else:
        prompts = [each.messages[-1].content for each in requests]
    sessions = [
        Session(
            (Turn(prompt, each.output_length or output_len, each.expected),),
            time,
            each.messages[:-1],
        )
        for each, prompt, time in zip(requests, prompts, times, strict=True)
    ]
    return Workload(
        "trace",
        sessions,
        chat=shape.body == "messages",
        ignore_eos=shape.length == "output_length",
        approximate_lengths=only_lengths and tokenizer.approximate,
    )


class _Blocks:
    """The words that hash ids stand for: for each the same everywhere, and unlike all others'."""

    def __init__(self, tokenizer: Tokenizer, block_size: int, seed: int) -> None:
        self._text = RandomText(tokenizer, seed)
        self._block_size = block_size
        self._seed = seed
        self._words: dict[int | str, list[str]] = {}

    def prompt(self, request: TraceRequest) -> str:
        """Writes a prompt of a request's length."""
        words = [word for hash_id in request.hash_ids for word in self._block(hash_id)]
        return self._text.join(words[: request.input_length])

    def _block(self, hash_id: int | str) -> list[str]:
        words = self._words.get(hash_id)
        if words is None:
            index = len(self._words)
            rng = random.Random(f"trace {self._seed}, block {index}")
            words = self._words[hash_id] = self._text.draw(index, self._block_size, rng)
        return words
