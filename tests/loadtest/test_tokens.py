from collections.abc import Callable
from pathlib import Path

import pytest

from headlong.demo.paths import MODEL_DIR
from headlong.loadtest.hub_tokenizer import load_tokenizer
from headlong.loadtest.tokens import WordTokenizer


def test_words_and_marks_are_counted_without_a_tokenizer() -> None:
    words = WordTokenizer()
    assert words.approximate
    assert len(words.encode("The access code Alice 4821.")) == 6
    first, second, third = words.encode("a b a")
    assert first == third != second
    assert words.prompt_counter(chat=True)("One, two.") == 4
    assert words.encode("") == []


def test_a_model_counts_its_own_tokens() -> None:
    tokenizer = load_tokenizer(str(MODEL_DIR))
    assert not tokenizer.approximate
    text = "The access code Alice 4821."
    assert len(tokenizer.encode(text)) == 7
    completion = tokenizer.prompt_counter(chat=False)
    chat = tokenizer.prompt_counter(chat=True)
    assert completion(text) == 7
    assert chat(text) > completion(text)


def test_a_folder_without_a_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded") as raised:
        load_tokenizer(str(tmp_path))
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_chat_needs_a_template(tiny_model: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(str(tiny_model("llama")))
    assert tokenizer.prompt_counter(chat=False)("ab") >= 2
    with pytest.raises(ValueError, match=r"has no chat template; ask for completions instead$"):
        tokenizer.prompt_counter(chat=True)
