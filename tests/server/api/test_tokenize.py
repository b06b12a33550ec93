import asyncio
from importlib.metadata import version

import pytest

from headlong.server.api.prompts import PromptEncoder

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def ask(client):
    def send(path, **body):
        return client.post(path, json=body)

    return send


def test_a_text(ask, engine):
    body = ask("/tokenize", prompt="hé").json()
    assert body == {
        "count": 3,
        "max_model_len": 64,
        "tokens": engine.tokenizer("hé")["input_ids"],
    }
    assert not engine.admitted


def test_tokens_as_the_vocabulary_has_them(ask):
    body = ask("/tokenize", model="alias", prompt="a b", return_token_strs=True).json()
    assert body["token_strs"] == ["a", "Ġ", "b"]


def test_a_conversation_as_chat_completions_encode_it(ask, post, engine):
    for fields in (
        {},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"tone": "dry"}},
        {
            "messages": [*USER, {"role": "assistant", "content": "Sure"}],
            "continue_final_message": True,
        },
    ):
        asked = {"messages": USER, **fields}
        assert post("/v1/chat/completions", **asked).status_code == 200
        assert ask("/tokenize", **asked).json()["tokens"] == engine.seen[-1][0]


def test_what_is_over_the_context_is_counted(ask):
    assert ask("/tokenize", prompt="a" * 1000).json()["count"] == 1000
    messages = [{"role": "user", "content": "a" * 1000}]
    assert ask("/tokenize", messages=messages).json()["count"] > 1000
    assert ask("/tokenize", prompt="").json()["count"] == 0


def test_there_is_a_limit(ask, monkeypatch):
    monkeypatch.setattr("headlong.server.api.prompts.MAX_TOKENIZE_CHARS", 10)
    response = ask("/tokenize", prompt="a" * 10_000)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_special_tokens_are_optional(ask, engine, monkeypatch):
    calls = []
    call = type(engine.tokenizer).__call__

    def watch(self, texts, **options):
        calls.append(options["add_special_tokens"])
        return call(self, texts, **options)

    monkeypatch.setattr(type(engine.tokenizer), "__call__", watch)
    ask("/tokenize", prompt="a")
    ask("/tokenize", prompt="a", add_special_tokens=False)
    ask("/tokenize", messages=USER)
    ask("/tokenize", messages=USER, add_special_tokens=True)
    assert calls == [True, False, False, True]


def test_there_and_back(ask, engine):
    tokens = ask("/tokenize", prompt="wörld <|end|>").json()["tokens"]
    assert 0 in tokens
    assert ask("/detokenize", tokens=tokens).json() == {"prompt": "wörld <|end|>"}
    assert ask("/detokenize", model="alias", tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "x", "content": ""}]}, 400, "messages.0.role"),
        ("/tokenize", {"messages": USER, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ("/tokenize", {"messages": USER, "tools": [TOOL]}, 400, "tools"),
        ("/tokenize", {"model": "other", "prompt": "a"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [261]}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, 400, "tokens"),
        ("/detokenize", {"model": "other", "tokens": [1]}, 404, "model"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(ask, path, body, status, param):
    response = ask(path, **body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


def test_the_number_of_tokens_is_bounded(ask, monkeypatch):
    response = ask("/detokenize", tokens=[1] * 60_000)
    assert response.status_code == 200
    from headlong.server.api.schemas_tokenize import MAX_DETOKENIZE_TOKENS, DetokenizeRequest

    with pytest.raises(ValueError, match="at most"):
        DetokenizeRequest(tokens=[1] * (MAX_DETOKENIZE_TOKENS + 1))


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_bodies_are_strict_json(client, path):
    assert client.post(path, content=b"prompt=a").status_code == 415
    headers = {"content-type": "application/json"}
    assert client.post(path, content=b"{", headers=headers).status_code == 400
    assert client.post(path, content=b"[]", headers=headers).status_code == 400
    assert client.post(path, content=b" " * 300_000, headers=headers).status_code == 413


def test_the_tokenizer(client, engine):
    info = client.get("/tokenizer_info").json()
    assert info == {
        "tokenizer_class": type(engine.tokenizer).__name__,
        "vocab_size": 261,
        "model_max_length": 64,
        "bos_token": None,
        "eos_token": "<|end|>",
        "pad_token": None,
        "unk_token": None,
        "special_tokens": ["<|end|>"],
        "chat_template": engine.tokenizer.chat_template,
    }
    engine.tokenizer.chat_template = None
    assert client.get("/tokenizer_info").json()["chat_template"] is None


def test_the_template_of_several_is_the_default_one(client, engine):
    engine.tokenizer.chat_template = {"default": "d", "tool_use": "t"}
    assert client.get("/tokenizer_info").json()["chat_template"] == "d"


def test_the_version(client):
    assert client.get("/version").json() == {"version": version("headlong")}


def test_the_first_text_over_the_context_spares_the_others(post, engine, monkeypatch):
    encoded = []
    encode = PromptEncoder._encode

    def count(self, text, special):
        encoded.append(text)
        return encode(self, text, special)

    monkeypatch.setattr(PromptEncoder, "_encode", count)
    error = post("/v1/completions", prompt=["a", "b" * 65, "c"]).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert encoded == ["a", "b" * 65]


def test_tokens_are_named_beside_the_event_loop(ask, engine, monkeypatch):
    called = []
    convert = engine.tokenizer.convert_ids_to_tokens

    def note(token_ids):
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        called.append(token_ids)
        return convert(token_ids)

    monkeypatch.setattr(engine.tokenizer, "convert_ids_to_tokens", note)
    body = ask("/tokenize", prompt="a", return_token_strs=True).json()
    assert body["token_strs"] == ["a"]
    assert called
