"""Whatever JSON arrives, the answer is a success or a client's error in OpenAI's form."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headlong.server.api.schemas_chat import ChatRequest
from headlong.server.api.schemas_completions import CompletionRequest
from headlong.server.api.schemas_tokenize import DetokenizeRequest, TokenizeChat, TokenizeText
from headlong.server.api.unsupported import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    DETOKENIZE_FIELDS,
    TOKENIZE_CHAT_FIELDS,
    TOKENIZE_TEXT_FIELDS,
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "system", "assistant", "tool"]) | SCALARS,
        "content": SCALARS
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": SCALARS}), max_size=2),
        "tool_calls": SCALARS,
    },
)
VALUES = st.recursive(
    SCALARS | MESSAGES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("path", "names", "least"),
    [
        (
            "/v1/completions",
            [*CompletionRequest.model_fields, *COMPLETION_FIELDS],
            {"model": "alias", "prompt": "a"},
        ),
        (
            "/v1/chat/completions",
            [*ChatRequest.model_fields, *CHAT_FIELDS],
            {"model": "alias", "messages": [{"role": "user", "content": "a"}]},
        ),
        (
            "/tokenize",
            sorted(
                set().union(
                    TokenizeText.model_fields,
                    TokenizeChat.model_fields,
                    TOKENIZE_TEXT_FIELDS,
                    TOKENIZE_CHAT_FIELDS,
                )
            ),
            {},
        ),
        ("/detokenize", [*DetokenizeRequest.model_fields, *DETOKENIZE_FIELDS], {}),
    ],
)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_body(client, engine, path, names, least, data):
    fields = data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    response = client.post(
        path,
        content=json.dumps({**least, **fields}),
        headers={"content-type": "application/json"},
    )
    assert response.status_code in {200, 400, 404}, response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert len(response.content) < 4000
    assert not engine.running
    assert not engine.num_places
