"""Log probabilities of tokens, with the tokens' texts."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from headlong.server.engine.outputs import PositionLogprobs, TokenLogprob
from headlong.server.engine.sampler import SampledToken, report_logprobs
from headlong.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of a step that predict tokens of a prompt.

    Attributes:
        sequence: Whose prompt it is.
        first_row: The first of them, in the packed batch.
        targets: The tokens that they should predict, a row each.
    """

    sequence: Sequence
    first_row: int
    targets: list[int]


def prompt_rows(sequence: Sequence, first_row: int, num_tokens: int) -> PromptRows | None:
    """Which rows of a chunk predict tokens of its prompt, if these are wanted.

    Args:
        sequence: Its next `num_tokens` tokens are the chunk.
        first_row: Of the chunk.
        num_tokens: Of the chunk.
    """
    if not sequence.scores_prompt:
        return None
    start = sequence.num_computed_tokens
    end = min(start + num_tokens + 1, sequence.num_prompt_tokens)
    targets = sequence.token_ids[start + 1 : end]
    return PromptRows(sequence, first_row, targets) if targets else None


class TokenReporter:
    """Names tokens.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def position(self, token: SampledToken) -> PositionLogprobs:
        """A token that was reported with its log probability."""
        assert token.logprob is not None
        return PositionLogprobs(
            chosen=self._named(token.token_id, token.logprob),
            top=tuple(self._named(*each) for each in token.top),
        )

    def score_prompt(self, rows: PromptRows, logits: torch.Tensor) -> list[PositionLogprobs]:
        """The log probabilities of some tokens of a prompt.

        Args:
            rows: Which.
            logits: float32 [len(rows.targets), vocab_size].
        """
        count = rows.sequence.params.prompt_logprobs or 0
        logprobs = torch.log_softmax(logits, dim=-1)
        tokens = report_logprobs(logprobs, rows.targets, [count] * len(rows.targets))
        return [self.position(token) for token in tokens]

    def _named(self, token_id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token_id, self._text(token_id), logprob)

    def _text(self, token_id: int) -> str:
        if token_id not in self._texts:
            text = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            self._texts[token_id] = text
        return self._texts[token_id]
