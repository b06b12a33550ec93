import pytest
from transformers import PreTrainedTokenizerFast

from headlong.profiling.errors import UnsupportedModelError
from headlong.profiling.needles import NeedlePrompt, needle_prompts
from headlong.profiling.prompts import check_tokenizer, encode_prompt, token_counter


def prompts(tokenizer: PreTrainedTokenizerFast, chat: bool) -> list[NeedlePrompt]:
    return needle_prompts(token_counter(tokenizer, chat=chat), 400, 5, seed=1, num_distractors=2)


def test_chat_needle_is_the_statement(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in prompts(byte_tokenizer, True):
        encoded = encode_prompt(byte_tokenizer, prompt, chat=True)
        ids = [encoded.token_ids[i] for i in encoded.needle_positions]
        assert byte_tokenizer.decode(ids) == prompt.fact.statement
        expected = f"<u>{prompt.haystack}\n{prompt.fact.question}\n<a>"
        assert byte_tokenizer.decode(encoded.token_ids) == expected
        assert 380 <= len(encoded.token_ids) <= 400


def test_completion_needle_is_the_value(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in prompts(byte_tokenizer, False):
        encoded = encode_prompt(byte_tokenizer, prompt, chat=False)
        first, last = encoded.needle_positions[0], encoded.needle_positions[-1]
        assert byte_tokenizer.decode(encoded.token_ids[first : last + 1]) == prompt.fact.answer
        assert byte_tokenizer.decode(encoded.token_ids[:first]).endswith(f"{prompt.fact.lead} ")
        assert byte_tokenizer.decode(encoded.token_ids) == prompt.completion
        assert len(encoded.token_ids) <= 400


def test_refuses_a_template_that_changes_the_text(
    byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts(byte_tokenizer, True)[0]
    monkeypatch.setattr(byte_tokenizer, "chat_template", "{{ messages[0]['content'] | upper }}")
    with pytest.raises(UnsupportedModelError, match="changes the text of the user's message"):
        encode_prompt(byte_tokenizer, prompt, chat=True)


def test_refuses_a_slow_tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedModelError, match="Slow is not a fast tokenizer"):
        check_tokenizer(Slow(), chat=False)
    check_tokenizer(byte_tokenizer, chat=True)
