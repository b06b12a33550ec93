import pytest

PATH = "/v1/chat/completions"
CALLS = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def prompts(engine):
    return [engine.tokenizer.decode(ids) for ids, _ in engine.seen]


def test_an_answer_has_a_message_and_usage(post, engine):
    body = post(PATH).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello wörld"}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    [prompt] = prompts(engine)
    assert prompt == "<user>hi</><assistant>"
    assert body["usage"]["prompt_tokens"] == len(prompt)


def test_max_tokens_is_what_the_context_leaves_unless_said(post, engine):
    post(PATH)
    post(PATH, max_tokens=2)
    post(PATH, max_completion_tokens=3, max_tokens=3)
    assert [params.max_tokens for _, params in engine.seen] == [64 - 22, 2, 3]


def test_text_parts_and_developer_messages(post, engine):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    post(
        PATH,
        messages=[
            {"role": "developer", "content": "be"},
            {"role": "user", "content": parts, "name": "x"},
        ],
    )
    assert prompts(engine) == ["<system>be</><user>a\nb</><assistant>"]


def test_the_template_can_be_steered(post, engine):
    messages = [{"role": "assistant", "content": "Sure"}]
    post(PATH, add_generation_prompt=False)
    post(PATH, messages=messages, continue_final_message=True)
    post(PATH, chat_template_kwargs={"tone": "dry"})
    assert prompts(engine) == ["<user>hi</>", "<assistant>Sure", "<user>hi</><assistant>dry"]


def test_logprobs(post):
    choice = post(PATH, logprobs=True, top_logprobs=2).json()["choices"][0]
    first, _, third, _ = choice["logprobs"]["content"]
    assert first == {
        "token": "Hel",
        "logprob": -0.25,
        "bytes": [72, 101, 108],
        "top_logprobs": [
            {"token": "Hel", "logprob": -0.25, "bytes": [72, 101, 108]},
            {"token": "\ufffd", "logprob": -9999.0, "bytes": None},
        ],
    }
    assert third["bytes"] == list(" wör".encode())


def test_a_stream_greets_then_tells_then_ends(post, events):
    *chunks, usage, done = events(
        post(PATH, stream=True, stream_options={"include_usage": True}).text
    )
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello wörld"
    assert choices[-1]["delta"] == {}
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons == [None] * 5 + ["stop"]


def test_stream_logprobs(post, events):
    *chunks, _ = events(post(PATH, stream=True, logprobs=True).text)
    tokens = [
        entry["token"]
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert tokens == ["Hel", "lo", " wör", "ld"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool"}]}, "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": "hi"}, "messages"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}]},
            "messages.0.tool_calls.0.type",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.tool_calls"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": CALLS}]},
            "messages.0.tool_calls",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": None}]},
            "messages.0.content",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "function_call": {}}]},
            "messages.0.function_call",
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        (
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "chat_template_kwargs.chat_template",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs.eos_token"),
        ({"chat_template_kwargs": {"tone": 3}}, "messages"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(post, engine, fields, param):
    response = post(PATH, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not engine.seen


def test_image_parts_are_refused_as_such(post):
    part = {"type": "image_url", "image_url": {"url": "http://x"}}
    error = post(PATH, messages=[{"role": "user", "content": [part]}]).json()["error"]
    assert "'image_url' are not supported" in error["message"]


def test_what_a_template_raises_is_for_the_client(post, engine):
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    response = post(PATH)
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]


def test_a_template_cannot_reach_python(post, engine):
    engine.tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"
    assert post(PATH).status_code == 400


def test_a_model_without_a_template_says_so(post, engine):
    engine.tokenizer.chat_template = None
    response = post(PATH)
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_a_conversation_over_the_context(post, engine):
    for content in ("x" * 60, "x" * 5000):
        response = post(PATH, messages=[{"role": "user", "content": content}])
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "messages"
        assert "64" in error["message"]
    assert not engine.seen
