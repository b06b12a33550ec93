"""Logits of a given completion, decoded as the engine would decode its own.

Prefill sees all of a prompt, whatever a retrieval budget says. What a budget costs shows only in
tokens that are decoded under it: here they are, one by one, with the next token given.
"""

from collections.abc import Sequence
from contextlib import closing

import torch

from headlong.server.engine.engine import Engine
from headlong.server.errors import InvalidRequestError


def score_decodes(
    engine: Engine, prompt: Sequence[int], continuation: Sequence[int]
) -> torch.Tensor:
    """What an engine says of each token of a continuation, under its own settings.

    Tokens that choose pages are decoded one by one; where the budget covers the context, or there
    is none, many are computed at once, which gives the same logits.

    Args:
        engine: Nothing runs on it.
        prompt: Token ids, at least one.
        continuation: Token ids that follow it, at least one.

    Returns:
        float32 [len(continuation), vocab_size], on the model's device: row i is what it says of
        continuation[i], given all tokens before.

    Raises:
        ValueError: Requests run on the engine.
        InvalidRequestError: The prompt or the continuation is empty, or a token is not in the
            vocabulary.
        ContextLengthError: There are too many tokens.
    """
    if engine.has_work:
        raise ValueError("requests run on the engine")
    if not prompt or not continuation:
        raise InvalidRequestError("the prompt and its continuation need a token each", "prompt")
    # The logits at a token are about the next one; the last token has none.
    tokens = [*prompt, *continuation[:-1]]
    reader = engine.reader()
    with closing(
        reader.logits(tokens, since=len(prompt) - 1, num_prompt_tokens=len(prompt))
    ) as chunks:
        return torch.cat(list(chunks))
