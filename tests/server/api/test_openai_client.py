import openai
import pytest

from headlong.server.errors import EngineDeadError

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def sdk(live):
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(sdk):
    assert [model.id for model in sdk.models.list()] == ["fake/model", "alias"]
    assert sdk.models.retrieve("alias").id == "alias"


def test_chat(sdk):
    answer = sdk.chat.completions.create(
        model="alias", messages=MESSAGES, logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == "Hello wörld"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.25
    assert answer.usage.completion_tokens == 4


def test_chat_stream(sdk):
    stream = sdk.chat.completions.create(
        model="alias", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == "Hello wörld"
    assert chunks[-1].usage.completion_tokens == 4


def test_completion(sdk):
    answer = sdk.completions.create(model="alias", prompt=["a", "b"], max_tokens=2, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["Hello", "Hello"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs.tokens == ["Hel", "lo"]


def test_completion_stream(sdk):
    stream = sdk.completions.create(model="alias", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello wörld"


def test_errors_have_their_classes(sdk):
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as overflow:
        sdk.completions.create(model="alias", prompt="a" * 99)
    assert overflow.value.code == "context_length_exceeded"
    assert overflow.value.param == "prompt"


def test_an_error_inside_a_stream(sdk, engine):
    engine.failure, engine.fail_at = EngineDeadError("the engine stopped"), 2
    stream = sdk.chat.completions.create(model="alias", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="the engine stopped"):
        list(stream)


def test_headers_over_the_limit_are_refused(sdk, engine):
    with pytest.raises((openai.APIStatusError, openai.APIConnectionError)):
        sdk.models.list(extra_headers={"x-long": "x" * 1_000_000})
    assert sdk.models.list()
