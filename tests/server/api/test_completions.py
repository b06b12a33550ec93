import pytest

PATH = "/v1/completions"


def test_a_completion_has_text_reason_and_usage(post, engine):
    response = post(PATH, prompt="abc")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "fake/model"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "Hello wörld",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": 2,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
        "kv_cache": {"peak_bytes": 100, "full_bytes": 300},
    }
    assert engine.tokenizer.decode(engine.seen[0][0]) == "abc"


def test_max_tokens_is_sixteen_unless_said(post, engine):
    post(PATH)
    post(PATH, max_tokens=2)
    post(PATH, max_completion_tokens=3)
    assert [params.max_tokens for _, params in engine.seen] == [16, 2, 3]


def test_the_default_of_max_tokens_shrinks_to_the_context(post, engine):
    post(PATH, prompt="a" * 60)
    assert engine.seen[0][1].max_tokens == 4


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (["ab", "c"], [2, 1]),
        ([5, 6, 7], [3]),
        ([[5], [6, 7]], [1, 2]),
    ],
)
def test_each_prompt_gives_a_choice(post, engine, prompt, expected):
    body = post(PATH, prompt=prompt).json()
    assert [len(ids) for ids, _ in engine.seen] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert {choice["text"] for choice in body["choices"]} == {"Hello wörld"}
    assert body["usage"]["prompt_tokens"] == sum(expected)
    assert body["usage"]["completion_tokens"] == 4 * len(expected)


def test_the_models_defaults_fill_what_is_left_out(post, engine):
    post(PATH, temperature=None)
    post(PATH, temperature=0, top_k=-1)
    defaults, given = (params for _, params in engine.seen)
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.5, 7, 1.0)
    assert (given.temperature, given.top_k) == (0.0, 0)


def test_every_parameter_reaches_the_engine(post, engine):
    given = {
        "max_tokens": 9,
        "temperature": 0.1,
        "top_p": 0.2,
        "top_k": 3,
        "min_p": 0.4,
        "seed": -5,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.6,
        "frequency_penalty": -0.7,
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "logprobs": 4,
    }
    response = post(PATH, stop=["x", "y"], stop_token_ids=[8], logit_bias={"9": 1}, **given)
    assert response.status_code == 200
    params = engine.seen[0][1]
    assert {name: getattr(params, name) for name in given} == given
    assert params.stop == ("x", "y")
    assert params.stop_token_ids == (8,)
    assert params.logit_bias == {9: 1.0}


def test_one_stop_string_needs_no_list(post, engine):
    post(PATH, stop="end")
    assert engine.seen[0][1].stop == ("end",)


def test_logprobs(post):
    logprobs = post(PATH, logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Hel", "lo", " wör", "ld"]
    assert logprobs["token_logprobs"] == [-0.25] * 4
    assert logprobs["text_offset"] == [0, 3, 5, 9]
    assert logprobs["top_logprobs"][0] == {"Hel": -0.25, "\ufffd": -9999.0}


def test_the_chosen_token_is_among_the_top_even_if_none_were_asked(post):
    logprobs = post(PATH, logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][1] == {"lo": -0.25}


def test_a_stream_adds_up_to_the_completion(post, events):
    response = post(PATH, stream=True, logprobs=1)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "Hello wörld"
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0], [3], [5], [9]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_a_stream_ends_with_usage_if_asked(post, events):
    response = post(PATH, stream=True, stream_options={"include_usage": True})
    *chunks, last, _ = events(response.text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    counts = {name: last["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    assert counts == {"prompt_tokens": 2, "completion_tokens": 4}
    assert last["usage"]["kv_cache"] == {"peak_bytes": 100, "full_bytes": 300}


def test_every_chunk_has_usage_if_asked(post, events):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = events(post(PATH, stream=True, stream_options=options).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [1, 2, 3, 4, 4]


def test_several_prompts_share_a_stream(post, events):
    *chunks, _ = events(post(PATH, prompt=["a", "b", "c"], stream=True).text)
    texts = ["", "", ""]
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["Hello wörld"] * 3


def test_separators_of_lines_are_escaped_in_streams(post, engine, events):
    engine.pieces = ["a\u2028b\x85c\u2029d\n\n"]
    text = post(PATH, stream=True).text
    assert len(text.splitlines()) == text.count("\n")
    assert events(text)[0]["choices"][0]["text"] == engine.pieces[0]
