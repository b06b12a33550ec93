from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from headlong.profiling.errors import UnsupportedModelError
from headlong.profiling.evaluation import NeedleResult, needle_accuracy
from headlong.profiling.needles import needle_prompts
from headlong.profiling.prompts import token_counter


class Oracle:
    """Answers the first prompts from what the test knows, and the others wrongly."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, num_right: int, chat: bool) -> None:
        count = token_counter(tokenizer, chat=chat)
        self.prompts = needle_prompts(count, 400, 4, 7)
        self.num_right = num_right
        self.calls: list[tuple[list[list[int]], int]] = []

    def __call__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        self.calls.append(([list(ids) for ids in prompts], max_new_tokens))
        right = [f" {prompt.fact.answer}." for prompt in self.prompts]
        return right[: self.num_right] + ["nothing"] * (len(prompts) - self.num_right)


def measure(
    tokenizer: PreTrainedTokenizerFast, num_right: int, chat: bool = True
) -> tuple[NeedleResult, Oracle]:
    oracle = Oracle(tokenizer, num_right, chat)
    return needle_accuracy(oracle, tokenizer, 400, 4, 7, chat=chat, max_new_tokens=9), oracle


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("num_right", [0, 3, 4])
def test_accuracy(byte_tokenizer: PreTrainedTokenizerFast, num_right: int, chat: bool) -> None:
    result, oracle = measure(byte_tokenizer, num_right, chat)
    assert result.accuracy == num_right / 4
    assert [record.correct for record in result.records] == [i < num_right for i in range(4)]
    assert [record.depth for record in result.records] == [0.0, 1 / 3, 2 / 3, 1.0]
    assert (result.context_tokens, result.seed, result.chat) == (400, 7, chat)
    ((prompts, max_new_tokens),) = oracle.calls
    assert max_new_tokens == 9
    for ids, prompt, record in zip(prompts, oracle.prompts, result.records, strict=True):
        assert prompt.haystack in byte_tokenizer.decode(ids)
        assert record.num_prompt_tokens == len(ids) <= 400
        assert (record.statement, record.answer) == (prompt.fact.statement, prompt.fact.answer)


def test_is_reproducible(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    first, oracle = measure(byte_tokenizer, 2)
    again, second_oracle = measure(byte_tokenizer, 2)
    assert first == again
    assert oracle.calls == second_oracle.calls
    assert NeedleResult.model_validate_json(first.model_dump_json()) == first


def test_refuses(byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_few(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        return ["one"]

    with pytest.raises(ValueError, match="generate gave 1 texts for 2 prompts"):
        needle_accuracy(too_few, byte_tokenizer, 400, 2, 0)
    with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
        needle_accuracy(too_few, byte_tokenizer, 400, 0, 0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        needle_accuracy(too_few, byte_tokenizer, 400, 1, 0, max_new_tokens=0)
    with pytest.raises(ValueError, match="context_tokens=30 is too short"):
        needle_accuracy(too_few, byte_tokenizer, 30, 1, 0)
    monkeypatch.setattr(byte_tokenizer, "chat_template", None)
    with pytest.raises(UnsupportedModelError, match="has no chat template"):
        needle_accuracy(too_few, byte_tokenizer, 400, 1, 0)
