"""Needle accuracy: how often a model finds one fact in a long prompt.

An evaluation knows no engine. It hands prompts to a callable and judges the texts that come back,
so that one evaluation serves transformers, an engine and an HTTP client alike.
"""

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from headlong.profiling.needles import is_answered, needle_prompts
from headlong.profiling.prompts import check_tokenizer, encode_prompt, token_counter

Generate = Callable[[Sequence[Sequence[int]], int], Sequence[str]]
"""Continues prompts greedily: ``(token ids of each prompt, max_new_tokens) -> texts``."""


class NeedleRecord(BaseModel):
    """One prompt and what came of it.

    Attributes:
        depth: Where the needle lay, 0 (start) to 1 (end).
        num_prompt_tokens: The prompt's length.
        statement: The needle.
        answer: The value asked for.
        generated: The text that came back.
        correct: Whether it holds the answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: float
    num_prompt_tokens: int
    statement: str
    answer: str
    generated: str
    correct: bool


class NeedleResult(BaseModel):
    """What an evaluation found.

    Attributes:
        context_tokens: The length that the prompts fill.
        seed: Which prompts they were.
        chat: Whether they were chats.
        accuracy: Fraction of prompts answered, 0 to 1.
        records: One for each prompt, by depth.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    context_tokens: int
    seed: int
    chat: bool
    accuracy: float
    records: tuple[NeedleRecord, ...]


def needle_accuracy(
    generate: Generate,
    tokenizer: PreTrainedTokenizerBase,
    context_tokens: int,
    num_prompts: int,
    seed: int,
    *,
    chat: bool = True,
    num_distractors: int = 4,
    max_new_tokens: int = 32,
) -> NeedleResult:
    """Measures needle accuracy at one context length.

    Args:
        generate: Is called once, with all prompts.
        tokenizer: The model's, a fast one.
        context_tokens: The length that each prompt fills.
        num_prompts: How many; their needles lie evenly from the start to the end.
        seed: Which prompts; equal arguments give equal prompts.
        chat: Whether to ask in a chat, or to let the needle's sentence be completed.
        num_distractors: Facts of the same shape about others in each prompt.
        max_new_tokens: The longest answer.

    Raises:
        UnsupportedModelError: If the tokenizer is not fast, or has no chat template for a chat.
        ValueError: If an argument is out of range, or ``generate`` gives back another number of
            texts.
    """
    for name, value in (("num_prompts", num_prompts), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_tokenizer(tokenizer, chat=chat)
    prompts = needle_prompts(
        token_counter(tokenizer, chat=chat), context_tokens, num_prompts, seed, num_distractors
    )
    token_ids = [encode_prompt(tokenizer, prompt, chat=chat).token_ids for prompt in prompts]
    texts = generate(token_ids, max_new_tokens)
    if len(texts) != num_prompts:
        raise ValueError(f"generate gave {len(texts)} texts for {num_prompts} prompts")
    records = tuple(
        NeedleRecord(
            depth=prompt.depth,
            num_prompt_tokens=len(ids),
            statement=prompt.fact.statement,
            answer=prompt.fact.answer,
            generated=text,
            correct=is_answered(prompt.fact, text),
        )
        for prompt, ids, text in zip(prompts, token_ids, texts, strict=True)
    )
    accuracy = sum(record.correct for record in records) / num_prompts
    return NeedleResult(
        context_tokens=context_tokens, seed=seed, chat=chat, accuracy=accuracy, records=records
    )
