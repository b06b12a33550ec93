import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headlong.server.engine.detokenizer import REPLACEMENT, Detokenizer, StopStrings
from support.structured import byte_fallback_tokenizer
from support.tiny_models import save_byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


FALLBACK = byte_fallback_tokenizer()


@given(prompt=st.text(max_size=8), text=st.text(max_size=30))
def test_single_bytes_in_a_row_join_to_the_text(prompt: str, text: str) -> None:
    text = text.replace(REPLACEMENT, "").replace("▁", "")
    encode = FALLBACK.backend_tokenizer.encode
    detokenizer = Detokenizer(FALLBACK, encode(prompt).ids, skip_special_tokens=True)
    ids = encode(text, add_special_tokens=False).ids
    assert "".join(map(detokenizer.push, ids)) == text
    assert detokenizer.finish() == ""


@given(prompt=st.text(max_size=8), text=st.text(max_size=30))
def test_pieces_join_to_the_text_and_never_split_a_character(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str
) -> None:
    text = text.replace(REPLACEMENT, "")
    detokenizer = Detokenizer(tokenizer, tokenizer.encode(prompt), skip_special_tokens=True)
    pieces = [detokenizer.push(token) for token in tokenizer.encode(text)]
    assert all(REPLACEMENT not in piece for piece in pieces)
    assert "".join(pieces) == text
    assert detokenizer.finish() == ""


def test_an_unfinished_character_shows_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=True)
    first, second, *_ = tokenizer.encode("€")
    assert detokenizer.push(first) + detokenizer.push(second) == ""
    assert detokenizer.finish() == REPLACEMENT


def test_a_prompt_that_ends_inside_a_character(tokenizer: PreTrainedTokenizerBase) -> None:
    first, *rest = tokenizer.encode("€")
    detokenizer = Detokenizer(tokenizer, [*tokenizer.encode("ab"), first], skip_special_tokens=True)
    assert "".join(map(detokenizer.push, rest)) == "€"


def test_bytes_that_never_make_a_character_do_not_pile_up(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=True)
    first = tokenizer.encode("€")[0]
    text = "".join(detokenizer.push(first) for _ in range(500))
    assert len(text) >= 400
    assert set(text) == {REPLACEMENT}


def test_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    shown = Detokenizer(tokenizer, [], skip_special_tokens=False)
    hidden = Detokenizer(tokenizer, [], skip_special_tokens=True)
    assert shown.push(2) == "<eos>"
    assert hidden.push(2) == ""


@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=3), max_size=3),
    include=st.booleans(),
)
def test_stop_strings_against_the_whole_text(
    pieces: list[str], stop: list[str], include: bool
) -> None:
    finder = StopStrings(stop, include=include)
    shown = ""
    found = None
    for piece in pieces:
        text, found = finder.push(piece)
        shown += text
        if found is not None:
            break
        # What is held back may become a stop string, and nothing shown is part of one.
        assert not any(each in shown for each in stop)
    whole = "".join(pieces)
    if found is None:
        assert shown + finder.finish() == whole
        assert not any(each in whole for each in stop)
    else:
        assert whole.startswith(shown)
        assert found in stop
        assert shown.endswith(found) == include or not include


def test_a_stop_string_over_two_pieces_is_held_back() -> None:
    finder = StopStrings(["END"], include=False)
    assert finder.push("the E") == ("the ", None)
    assert finder.push("N") == ("", None)
    assert finder.push("D and more") == ("", "END")
    other = StopStrings(["END"], include=True)
    assert other.push("the EN") == ("the ", None)
    assert other.push("D.") == ("END", "END")
