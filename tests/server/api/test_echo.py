"""`echo`, and with `logprobs` what lm-eval reads of it."""

import json
from itertools import chain, pairwise

import pytest

from headlong.server.api.echo import MAX_ECHO_LOGPROBS, check_echo_size
from headlong.server.api.prompts import EncodedPrompt
from headlong.server.errors import InvalidRequestError

PATH = "/v1/completions"


def test_lm_evals_request(post, engine):
    prompts = engine.tokenizer(["Hi!", "no"])["input_ids"]
    body = post(
        PATH, prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    ).json()
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert {len(entries) for entries in logprobs.values()} == {len(prompt) + 1}
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:-1] == [-token / 100 for token in prompt[1:]]
        for token, chosen, top in list(
            zip(
                logprobs["tokens"],
                logprobs["token_logprobs"],
                logprobs["top_logprobs"],
                strict=True,
            )
        )[1:]:
            assert top[token] == chosen
        # What lm-eval calls greedy: nothing is more probable than the token.
        assert max(logprobs["top_logprobs"][1].values()) == -0.125
        text = engine.tokenizer.decode(prompt) + "Hel"
        assert choice["text"] == text
        assert "".join(logprobs["tokens"]) == text
        starts = [*logprobs["text_offset"], len(text)]
        pieces = [text[a:b] for a, b in pairwise(starts)]
        assert pieces == logprobs["tokens"]
    assert body["usage"]["prompt_tokens"] == 5
    assert body["usage"]["completion_tokens"] == 2
    assert {params.prompt_logprobs for _, params in engine.seen} == {1}


def test_echo_alone_repeats_the_prompt(post, engine):
    choices = post(PATH, prompt=["ab ", "c"], echo=True).json()["choices"]
    assert [choice["text"] for choice in choices] == ["ab Hello wörld", "cHello wörld"]
    assert [choice["logprobs"] for choice in choices] == [None, None]
    assert engine.seen[0][1].prompt_logprobs is None


def test_no_echo_no_prompt_logprobs(post, engine):
    assert post(PATH, logprobs=1, echo=False).json()["choices"][0]["text"] == "Hello wörld"
    assert engine.seen[0][1].prompt_logprobs is None


def test_the_text_of_a_prompt_is_what_the_client_wrote(post, engine):
    text = "a<|end|>b"
    token_ids = engine.tokenizer(text)["input_ids"]
    assert 0 in token_ids
    assert post(PATH, prompt=text, echo=True, max_tokens=1).json()["choices"][0]["text"] == (
        "a<|end|>bHel"
    )
    [shown] = post(
        PATH, prompt=token_ids, echo=True, max_tokens=1, skip_special_tokens=False
    ).json()["choices"]
    assert shown["text"] == "a<|end|>bHel"
    [hidden] = post(PATH, prompt=token_ids, echo=True, max_tokens=1, logprobs=0).json()["choices"]
    assert hidden["text"] == "abHel"
    assert hidden["logprobs"]["text_offset"] == [0, 1, 1, 2]


@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_of_characters_of_several_tokens(post, engine, as_ids):
    text = "é€x"
    prompt = engine.tokenizer(text)["input_ids"] if as_ids else text
    [choice] = post(PATH, prompt=prompt, echo=True, logprobs=0).json()["choices"]
    assert choice["text"] == "é€xHello wörld"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 2, 3, 6, 8, 12]


def test_tokens_that_the_tokenizer_adds_are_not_in_the_text(post, engine, monkeypatch):
    call = type(engine.tokenizer).__call__

    def with_start(self, text, **options):
        encoded = call(self, text, **options)
        encoded["input_ids"] = [0, *encoded["input_ids"]]
        return encoded

    monkeypatch.setattr(type(engine.tokenizer), "__call__", with_start)
    [choice] = post(PATH, prompt="abc", echo=True, logprobs=1, max_tokens=1).json()["choices"]
    assert choice["text"] == "abcHel"
    assert choice["logprobs"]["tokens"] == ["<|end|>", "a", "b", "c", "Hel"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 3]


def test_a_stream_begins_with_the_prompt(post, events):
    whole = post(PATH, prompt="hé", echo=True, logprobs=1).json()["choices"][0]
    *chunks, _ = events(post(PATH, prompt="hé", echo=True, logprobs=1, stream=True).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["text"].startswith("hé")
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name, entries in whole["logprobs"].items():
        streamed = chain.from_iterable(choice["logprobs"][name] for choice in choices)
        assert list(streamed) == entries


@pytest.mark.parametrize("stream", [False, True])
def test_all_completions_of_a_prompt_echo_it(post, events, stream):
    response = post(PATH, prompt="abc", n=3, echo=True, logprobs=1, max_tokens=2, stream=stream)
    chunks = events(response.text)[:-1] if stream else [response.json()]
    texts, logprobs = [""] * 3, [[], [], []]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
        logprobs[choice["index"]] += choice["logprobs"]["token_logprobs"]
    assert texts == ["abcHello"] * 3
    assert logprobs[0][0] is None
    assert len(logprobs[0]) == 5
    assert logprobs[0] == logprobs[1] == logprobs[2]


def test_a_prompt_of_one_token(post):
    [choice] = post(PATH, prompt=[72], echo=True, logprobs=1, max_tokens=1).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_scoring_without_a_completion(post, engine, events, stream, logprobs):
    response = post(
        PATH,
        prompt=["abc", "de"],
        echo=True,
        max_tokens=0,
        logprobs=logprobs,
        stream=stream,
        stream_options={"include_usage": True} if stream else None,
        return_token_ids=True,
    )
    assert response.status_code == 200, response.text
    if stream:
        *chunks, last, _ = events(response.text)
        choices = [chunk["choices"][0] for chunk in chunks]
        usage = last["usage"]
    else:
        choices, usage = response.json()["choices"], response.json()["usage"]
    assert sorted(choice["text"] for choice in choices) == ["abc", "de"]
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    assert {choice["stop_reason"] for choice in choices} == {None}
    assert [choice["token_ids"] for choice in choices] == [[], []]
    if logprobs:
        counts = [len(choice["logprobs"]["tokens"]) for choice in choices]
        assert sorted(counts) == [2, 3]
    else:
        assert {choice["logprobs"] for choice in choices} == {None}
    assert usage["completion_tokens"] == 0
    assert usage["total_tokens"] == usage["prompt_tokens"] == 5
    assert {params.max_tokens for _, params in engine.seen} == {1}
    assert all(request.asked_max_tokens for request in engine.requests)


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"max_tokens": 0, "echo": False}])
def test_no_completion_without_echo(post, engine, fields):
    response = post(PATH, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"
    assert not engine.admitted


def test_chat_answers_have_at_least_one_token(post):
    assert post("/v1/chat/completions", max_tokens=0).json()["error"]["param"] == "max_tokens"


def test_log_probabilities_of_prompts_are_bounded():
    prompts = [EncodedPrompt([1] * 1024)] * 64
    check_echo_size(prompts, n=1, logprobs=15)
    for n, logprobs in ((1, 16), (2, 8), (128, 0)):
        with pytest.raises(InvalidRequestError, match=str(MAX_ECHO_LOGPROBS)) as refused:
            check_echo_size(prompts, n=n, logprobs=logprobs)
        assert refused.value.param == "logprobs"


def test_deltas_before_the_prompts_log_probabilities_wait(post, engine, events):
    """The engine may tell of other completions before it tells of the prompt."""
    outputs = engine._outputs

    async def late(request):
        held = None
        async for output in outputs(request):
            if output.prompt_logprobs is not None:
                held = output
                continue
            yield output
            if held is not None and output.index == request.n - 1:
                yield held
                held = None

    engine._outputs = late
    *chunks, _ = events(post(PATH, prompt="abc", n=2, echo=True, logprobs=1, stream=True).text)
    first = next(chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == 1)
    assert first["text"].startswith("abc")
    assert len(first["logprobs"]["token_logprobs"]) >= 4
    assert json.dumps(first["logprobs"]["token_logprobs"]).startswith("[null, -")
